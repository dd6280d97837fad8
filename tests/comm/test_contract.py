"""Ranks that make different collectives are told so, all of them, in the same words: over threads and in processes."""

import numpy as np
import pytest

from disttrain.comm import contract, threads
from tests.comm import calls, test_node

pytestmark = pytest.mark.timeout(60)


def join_node(comm):
    test_node.joined(lambda comm: None)(comm)


@pytest.mark.parametrize("prepare", [lambda comm: None, join_node], ids=["messages", "node"])
@pytest.mark.parametrize(("world_size", "odd"), [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)])
@pytest.mark.parametrize("name", calls.CELLS)
def test_every_difference_is_told_on_all_ranks(prepare, world_size, odd, name):
    calls.holds(threads.run(world_size, calls.differ, name, odd, prepare), name, odd)


@pytest.mark.parametrize("world_size", [2, 3])
def test_what_goes_ahead_is_16_bytes_once_to_each_rank(world_size):
    def heads(comm):
        send, sent = comm._isend, []

        def noted(array, dest, tag):
            if tag == contract.TAG:
                sent.append((dest, array.nbytes))
            return send(array, dest, tag)

        comm._isend = noted
        comm.all_reduce(np.ones(10**6), name="of what takes many messages" * 10)
        return sent

    neighbour = [[((rank + 1) % world_size, 16)] for rank in range(world_size)]
    assert threads.run(world_size, heads) == neighbour


def test_a_call_that_comes_late_is_compared_with_what_was_said_before():
    """Heads come in the order of first messages, here another than that of the calls."""

    def work(comm):
        if comm.rank == 0:
            first, second = (comm._channel("an operation", np.ones(3)) for _ in range(2))
            sends = [channel.send(np.full(3, number), 1) for number, channel in ((2.0, second), (1.0, first))]
            return all([send.test() for send in sends])  # noqa: C419 - each of them
        received = []
        for _ in range(2):
            array = np.zeros(3)
            comm._channel("an operation", np.ones(3)).receive(array, 0).wait()
            received.append(array.tolist())
        return received

    assert threads.run(2, work)[1] == [[1.0] * 3, [2.0] * 3]
