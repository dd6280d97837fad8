"""Gradients of the shards of a batch, added up in one order whatever the number of ranks.

A shard's gradients are written to a buffer that follows from the shard's place among those of its rank, and as soon as
one is final it is added to what it completes (`comm.canonical`). So the logarithm of the number of shards says how many
buffers there are, and no gradient is copied.
"""

from collections.abc import Callable, Sequence

import numpy as np

from disttrain.autodiff import Tensor
from disttrain.backend import Array, get_array_module
from disttrain.comm import Communicator
from disttrain.comm.base import Pending
from disttrain.comm.canonical import Layout, completed
from disttrain.data_parallel.buckets import BUCKET_BYTES, by_size, cut, sizes
from disttrain.data_parallel.flat import FlatBuffer
from disttrain.data_parallel.gradients import GradientSum, views


class ShardSum(GradientSum):
    """Sums gradients over the shards of a batch, on all ranks; every rank makes one.

    Args:
        comm: the ranks.
        buffers: where the parameters lie.
        run: the shards of this rank.
        current: returns which of them is computed, counted from 0; None: all together.
        bucket_bytes: least size of a bucket, but the last; None: 4 MiB.
        steps: as of `GradientSum`; what is kept in between are sums, whose bits do not depend on the ranks.

    Attributes:
        layout: of the shards of the batch that is computed.
    """

    keeps_sums = True
    layout: Layout
    _last: int  # shard of this rank

    def __init__(
        self,
        comm: Communicator,
        buffers: Sequence[FlatBuffer],
        run: range,
        current: Callable[[], int | None],
        *,
        bucket_bytes: int | None = None,
        steps: int = 1,
    ) -> None:
        least = bucket_bytes or BUCKET_BYTES
        super().__init__(comm, buffers, bucket_bytes=least, steps=steps)
        self._current = current
        self._joins = [completed(shard, run.start) for shard in run] or [0]
        # where each shard's gradients go: to the first buffer that no open sum is in
        self._depths = [sum(1 - joins for joins in self._joins[:number]) for number in range(len(self._joins))]
        others = [[get_array_module(f).zeros_like(f) for f in self.flat] for _ in range(max(self._depths))]
        self._stack = [self.flat, *others]
        self._views = [views(buffers, flats) for flats in self._stack]
        self._slices = [
            [
                b.gradient
                for i, flat in enumerate(flats)
                for b in cut(i, buffers[i], flat, by_size(sizes(buffers[i]), least))
            ]
            for flats in self._stack
        ]

    def begin(self) -> None:
        """Expect a gradient of every parameter from every shard."""
        # a rank has one without samples, where it has none
        self._last = len(self.layout.shards(self.comm.rank)) - 1
        if not self._current():
            super().begin()

    def home(self, parameter: Tensor, shard: int | None = None) -> Array:
        """Return where the gradient of a parameter in a shard lies; None: in the one that is computed."""
        return self._views[self._depths[self._shard(shard)]][parameter]

    def parts(self, parameter: Tensor) -> list[Array]:
        """Return the sums of the subtrees of shards that are open, and what stands where none is."""
        return [views[parameter] for views in self._views]

    def clear(self) -> None:
        """Forget the gradients of all shards: they may not be finite."""
        super().clear()
        for flats in self._stack[1:]:
            for flat in flats:
                flat[...] = 0

    def final(self, parameter: Tensor, shard: int | None = None) -> None:
        """Add a shard's gradient to those that it completes; after the last shard's, sum up over the ranks."""
        shard = self._shard(shard)
        if self._joins[shard]:
            depth = self._depths[shard]
            with np.errstate(over="ignore", invalid="ignore"):  # it shows in the result, on all ranks
                for left in range(depth - 1, depth - 1 - self._joins[shard], -1):
                    np.add(self._views[left][parameter], self._views[left + 1][parameter], self._views[left][parameter])
        if shard >= self._last:
            super().final(parameter)

    def finish(self) -> None:
        """After the last shard, wait until all buckets are summed up over the ranks."""
        shard = self._current()
        if shard is None or shard >= self._last:
            super().finish()

    def start(self, number: int, *, exactly: bool = True) -> Pending:
        """Start to sum up a bucket over the ranks."""
        sums = len(self.layout.tree[self.comm.rank])
        nodes = [slices[number] for slices in self._slices[:sums]]
        return self.comm.start_shard_sum(nodes, self.buckets[number].gradient, self.layout)

    def _shard(self, shard: int | None) -> int:
        number = self._current() if shard is None else shard
        assert number is not None
        return number


def shard_total(comm: Communicator, layout: Layout, parts: Sequence[Array], like: Array) -> Array:
    """Return the sum over all shards of arrays, one for each shard of this rank.

    Args:
        comm: the ranks.
        layout: of the shards.
        parts: of the shards of this rank that have samples; overwritten.
        like: an array of their shape and dtype, for a rank that has none.
    """
    shards = layout.shards(comm.rank)
    sums: list[Array] = []
    for shard, part in zip(shards, parts, strict=True):
        sums.append(part)
        for _ in range(completed(shard, shards.start)):
            right = sums.pop()
            sums[-1] += right
    out = sums[0] if sums else np.empty_like(like)
    comm.start_shard_sum(sums, out, layout).wait()
    return out
