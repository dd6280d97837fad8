"""Ranks that make different collectives are told so, all of them, in the same words: over threads and in processes."""

import pytest

from disttrain.comm import threads
from tests.comm import calls, test_node

pytestmark = pytest.mark.timeout(60)


def join_node(comm):
    test_node.joined(lambda comm: None)(comm)


@pytest.mark.parametrize("prepare", [lambda comm: None, join_node], ids=["messages", "node"])
@pytest.mark.parametrize(("world_size", "odd"), [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)])
@pytest.mark.parametrize("name", calls.CELLS)
def test_every_difference_is_told_on_all_ranks(prepare, world_size, odd, name):
    calls.holds(threads.run(world_size, calls.differ, name, odd, prepare), name, odd)
