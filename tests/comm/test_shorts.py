"""Sums of what is short: they are those of any collective, whichever way the ranks take, and whoever has to wait."""

import threading

import numpy as np
import pytest

from disttrain.comm import doubling, shorts, threads
from disttrain.comm.pending import ROOM
from disttrain.errors import CommError

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("world_size", range(1, 18))
def test_each_round_has_two_sides_and_parts_stay_in_the_order_of_ranks(world_size):
    left = {rank: doubling.rounds(rank, world_size) for rank in range(world_size)}
    parts = {rank: [rank] for rank in range(world_size)}
    sent = {}
    while any(left.values()):
        ready = [rank for rank, rounds in left.items() if rounds]
        for rank in ready:
            if left[rank][0].sends:
                sent.setdefault((rank, left[rank][0].peer), parts[rank])
        done = [rank for rank in ready if not left[rank][0].receives or (left[rank][0].peer, rank) in sent]
        assert done, f"all wait: {left}"
        for rank in done:
            one = left[rank].pop(0)
            if one.receives:
                came = sent.pop((one.peer, rank))
                parts[rank] = came if one.is_result else came + parts[rank] if one.is_first else parts[rank] + came
    assert not sent
    assert [*parts.values()] == [[*range(world_size)]] * world_size


@pytest.mark.parametrize("world_size", [2, 3, 4, 5])
@pytest.mark.parametrize("size", [0, 1, 1000, ROOM // 4])
def test_ranks_that_take_different_ways_meet(world_size, size):
    """What has gaps is copied first, and goes the way of all collectives; what has none is summed at once."""

    def work(comm):
        sums = []
        for odd in range(world_size):
            array = np.zeros((size, 2), np.float32)[:, 0] if comm.rank == odd else np.zeros(size, np.float32)
            array += comm.rank + odd
            comm.all_reduce(array, name=f"{odd}")
            sums.append(array.tolist())
        return sums

    total = sum(range(world_size))
    expected = [[float(total + world_size * odd)] * size for odd in range(world_size)]
    assert threads.run(world_size, work) == [expected] * world_size


def test_whoever_waits_for_a_late_rank_does_so_as_in_any_collective(monkeypatch):
    waits, steps = threading.Event(), shorts._steps

    def noted(*args):
        for request in steps(*args):
            waits.set()
            yield request

    monkeypatch.setattr(shorts, "_steps", noted)
    noted_waits = []

    def work(comm):
        if comm.rank == 1:
            assert waits.wait(30)  # rank 0 has given up to look for what comes at once
        else:
            monkeypatch.setattr("disttrain.progress.waits", lambda call, *_: noted_waits.append(call[0]))
        return comm.all_reduce(np.full(3, comm.rank + 1.0)).tolist()

    assert threads.run(2, work) == [[3.0] * 3] * 2
    assert 1 in noted_waits  # the record says in which call


def test_after_a_sum_that_has_failed_half_way_there_is_no_other():
    def work(comm):
        send = comm._isend

        def broken(array, dest, tag):
            raise CommError("the line is cut")

        comm.all_reduce(np.zeros(3))
        comm._isend, said = broken, []
        for _ in range(2):
            try:
                comm.all_reduce(np.zeros(3))
            except CommError as error:
                said.append(str(error))
            comm._isend = send
        return said

    failed = "the line is cut"
    assert threads.run(2, work) == [[failed, f"a collective of this communicator has failed before: {failed}"]] * 2


def test_more_kinds_than_are_kept_prepared():
    def work(comm):
        sizes = [*range(2 * shorts._KINDS)] * 2
        sums = [comm.all_reduce(np.full(size, 1.0)).tolist() for size in sizes]
        return sums == [[2.0] * size for size in sizes], len(comm._shorts._kinds)

    assert threads.run(2, work) == [(True, shorts._KINDS)] * 2


def test_a_message_that_is_not_as_long_as_its_call_says_is_an_error():
    def work(comm):
        channel = comm._channel("an operation", np.ones(3))
        if comm.rank == 0:
            channel.send(np.ones(2), 1).wait()
            return ""
        with pytest.raises(CommError) as caught:
            channel.receive(np.ones(3), 0).wait()
        return str(caught.value)

    assert threads.run(2, work)[1].startswith("rank 1: message from rank 0 has 16 bytes, expected 24;")
