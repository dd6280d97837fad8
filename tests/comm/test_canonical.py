"""Sums over shards: one order, that of a tree, on any number of ranks."""

import itertools

import numpy as np
import pytest

from disttrain.comm import connect, threads
from disttrain.comm.canonical import Layout, completed, total
from disttrain.data import shard

pytestmark = pytest.mark.timeout(60)


def layout_of(shards, present, world_size):
    parts = [shard(shards, rank, world_size) for rank in range(world_size)]
    return Layout(runs=tuple(range(part.start, part.stop) for part in parts), present=present)


def by_definition(leaves):
    """Return the sum of `leaves` in the tree, as its definition says: halves of a power of two, joined."""
    size = 1
    while size < len(leaves):
        size *= 2

    def node(start, size):
        if start >= len(leaves):
            return None
        if size == 1:
            return leaves[start]
        left, right = node(start, size // 2), node(start + size // 2, size // 2)
        return left if right is None else left + right

    return node(0, size)


class Term:
    """A sum that shows its order."""

    def __init__(self, words):
        self.words = words

    def __add__(self, other):
        return Term(f"({self.words}+{other.words})")


def sums_of(shards):
    """Add up `shards` as a rank does that holds them."""
    sums = []
    for number in shards:
        sums.append(Term(str(number)))
        for _ in range(completed(number, shards.start)):
            right = sums.pop()
            sums[-1] = sums[-1] + right
    return sums


def test_ranks_add_up_in_the_order_of_the_tree():
    for shards, world_size in itertools.product(range(1, 18), range(1, 10)):
        for present in range(1, shards + 1):
            layout = layout_of(shards, present, world_size)
            parts = [sums_of(layout.shards(rank)) for rank in range(world_size)]
            assert [len(each) for each in parts] == [len(nodes) for nodes in layout.tree]
            sums, nodes = itertools.chain(*parts), itertools.chain(*layout.tree)
            found = total(list(sums), list(nodes), lambda a, b: a + b)
            assert found.words == by_definition([Term(str(number)) for number in range(present)]).words


def test_a_rank_keeps_few_sums():
    layout = layout_of(1024, 1024, 3)
    # a run of consecutive numbers is at most two subtrees of each level
    assert max(len(nodes) for nodes in layout.tree) <= 2 * 10
    assert [len(nodes) for nodes in layout_of(1024, 1024, 4).tree] == [1, 1, 1, 1]


def arrays(shards, size, dtype):
    generator = np.random.default_rng(5)
    return [
        (generator.normal(size=size) * 10.0 ** generator.integers(-4, 5, size)).astype(dtype) for _ in range(shards)
    ]


def shard_sum(comm, layout, leaves):
    """Return what a rank receives of the sum of `leaves`, after adding up its own."""
    sums = []
    for number in layout.shards(comm.rank):
        sums.append(leaves[number].copy())
        for _ in range(completed(number, layout.shards(comm.rank).start)):
            right = sums.pop()
            sums[-1] += right
    out = sums[0] if sums else np.full_like(leaves[0], np.nan)
    comm.start_shard_sum(sums, out, layout).wait()
    return out


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize(("shards", "present"), [(8, 8), (8, 5), (8, 1), (6, 6), (1, 1)])
def test_every_rank_gets_the_bits_of_the_definition(world_size, shards, present):
    layout = layout_of(shards, present, world_size)
    for size, dtype in [(1000, "float32"), (37, "float64"), (3, "float32"), (0, "float32")]:
        leaves = arrays(present, size, dtype)
        expected = by_definition(leaves)
        for found in threads.run(world_size, shard_sum, layout, leaves):
            assert found.tobytes() == expected.tobytes()


def test_the_order_is_not_that_of_a_chain():
    leaves = arrays(8, 1000, "float32")
    chain = sum(leaves[1:], leaves[0])
    assert chain.tobytes() != by_definition(leaves).tobytes()


def test_a_negative_zero_stays_one_on_any_number_of_ranks():
    leaves = [np.array([-0.0])]
    for world_size in (1, 2, 3):
        for found in threads.run(world_size, shard_sum, layout_of(4, 1, world_size), leaves):
            assert np.signbit(found[0])


def test_one_worker_needs_no_messages():
    comm = connect("local")
    leaves = arrays(7, 10, "float64")
    assert shard_sum(comm, layout_of(7, 7, 1), leaves).tobytes() == by_definition(leaves).tobytes()


def test_sums_that_are_under_way_together_do_not_mix():
    layout = layout_of(6, 6, 4)
    first, second = arrays(6, 100, "float32"), arrays(6, 50, "float32")[::-1]

    def both(comm):
        pending, outs = [], []
        for leaves in (first, second):
            mine = [leaves[number].copy() for number in layout.shards(comm.rank)]
            nodes = [sum(mine[1:], mine[0])] if len(layout.tree[comm.rank]) == 1 else mine
            outs.append(np.empty_like(leaves[0]))
            pending.append(comm.start_shard_sum(nodes, outs[-1], layout))
        for each in reversed(pending):
            each.wait()
        return outs

    for one, other in threads.run(4, both):
        assert one.tobytes() == by_definition(first).tobytes()
        assert other.tobytes() == by_definition(second).tobytes()
