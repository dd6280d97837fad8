"""Sums over the shards of a batch, in one order whatever the number of ranks that hold them.

Shards are the leaves of a binary tree whose inner nodes join neighbours: 0 and 1, 2 and 3, then those pairs, and so on;
where a right half has no shard the left one stands for both. A rank holds consecutive shards. It adds up the whole
subtrees among them, and what is left is exchanged in slices: the owner of a slice adds its parts as the tree says, and
sends the result to all.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import numpy as np

from disttrain.comm.pending import Channel, HostArray, Steps
from disttrain.comm.ring import chunk_bounds

T = TypeVar("T")

Node: TypeAlias = tuple[int, int]  # level, 0 for a shard, and number within it


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which shards of a batch are where.

    Attributes:
        runs: the shards that each rank holds; consecutive, from rank to rank too.
        present: how many shards have samples, the first ones: not all, where a batch has fewer samples than shards.
    """

    runs: tuple[range, ...]
    present: int

    def shards(self, rank: int) -> range:
        """Return the shards with samples that `rank` holds."""
        return range(min(self.runs[rank].start, self.present), min(self.runs[rank].stop, self.present))

    def nodes(self, rank: int) -> list[Node]:
        """Return the subtrees that `rank` can add up, in the order of their shards."""
        stack: list[Node] = []
        shards = self.shards(rank)
        for shard in shards:
            level = completed(shard, shards.start)
            del stack[len(stack) - level :]
            stack.append((level, shard >> level))
        return stack

    @functools.cached_property
    def tree(self) -> list[list[Node]]:
        """The `nodes` of all ranks."""
        return [self.nodes(rank) for rank in range(len(self.runs))]

    @functools.cached_property
    def is_plain(self) -> bool:
        """Whether any sum over ranks is the tree's: there are two at most, with a subtree each."""
        return [len(nodes) for nodes in self.tree] in ([1], [1, 1])


def completed(shard: int, first: int) -> int:
    """Return how many subtrees `shard` completes where shards are taken one by one, from `first` on.

    So many times the last sum is added to the one before it; the next shard then begins a sum of its own.
    """
    level = 0
    while (shard + 1) % (2 << level) == 0 and shard + 1 - (2 << level) >= first:
        level += 1
    return level


def total(parts: Sequence[T], nodes: Sequence[Node], add: Callable[[T, T], T]) -> T:
    """Return the tree's sum of `parts`, which are those of `nodes`, in the order of their shards."""
    stack: list[tuple[Node, T]] = []
    for (level, number), part in zip(nodes, parts, strict=True):
        while number % 2 and stack and stack[-1][0] == (level, number - 1):
            part = add(stack.pop()[1], part)
            level, number = level + 1, number // 2
        stack.append(((level, number), part))
    result = stack.pop()[1]
    while stack:  # what is missing on the right counts for nothing
        result = add(stack.pop()[1], result)
    return result


def all_reduce(nodes: Sequence[HostArray], out: HostArray, layout: Layout, channel: Channel) -> Steps:
    """Put the tree's sum into `out` on every rank: the same bits on all, and for any number of them.

    Moves ``(p-1)/p`` of the array's bytes per rank for each of its nodes, and as many for the result, in two rounds.

    Args:
        nodes: the sums of this rank's subtrees, in the order of `layout`, each of shape ``(n,)``, C-contiguous;
            overwritten.
        out: shape ``(n,)``, C-contiguous; may be the first of `nodes`.
        layout: of the shards; the same on all ranks.
        channel: of this collective alone.
    """
    rank, ranks = channel.rank, range(channel.world_size)
    bounds = chunk_bounds(out.size, channel.world_size)
    parts = [slice(bounds[each], bounds[each + 1]) for each in ranks]
    others = [each for each in ranks if each != rank]
    mine = parts[rank]
    sends = [channel.send(node[parts[dest]], dest) for dest in others if _size(parts[dest]) for node in nodes]
    received: dict[int, list[HostArray]] = {rank: [node[mine] for node in nodes]}
    receives = []
    for source in others if _size(mine) else ():
        received[source] = [channel.scratch.take(_size(mine), out.dtype) for _ in layout.tree[source]]
        receives += [channel.receive(part, source) for part in received[source]]
    yield from receives
    if _size(mine):
        in_order = [part for each in ranks for part in received[each]]
        tree = [node for nodes in layout.tree for node in nodes]
        with np.errstate(over="ignore", invalid="ignore"):  # it shows in the result, on all ranks
            result = total(in_order, tree, _add)
        yield from sends  # of what the result may lie in
        np.copyto(out[mine], result)
    else:
        yield from sends
    for source in others:
        for part in received.get(source, ()):
            channel.scratch.give(part)
    receives = [channel.receive(out[parts[source]], source) for source in others if _size(parts[source])]
    sends = [channel.send(out[mine], dest) for dest in others if _size(mine)]
    yield from receives
    yield from sends


def _add(left: HostArray, right: HostArray) -> HostArray:
    return np.add(left, right, out=left)


def _size(part: slice) -> int:
    return int(part.stop - part.start)
