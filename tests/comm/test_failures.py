"""What goes wrong is named, and nobody is left waiting."""

import threading
import time

import numpy as np
import pytest

from disttrain import comm as dt_comm
from disttrain.comm import threads
from disttrain.errors import CommError, ConfigError, ContractError, ShapeError

pytestmark = pytest.mark.timeout(30)


class BoomError(Exception):
    pass


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_the_first_exception_reaches_the_caller_and_wakes_all_others(world_size):
    error, seen = BoomError("x"), {}

    def one_fails(comm):
        if comm.rank == comm.world_size - 1:
            time.sleep(0.05)  # the others are in their receive by then
            raise error
        try:
            comm.barrier()
        except CommError as woken:
            seen[comm.rank] = str(woken)
            raise

    before = threading.active_count()
    with pytest.raises(BoomError) as caught:
        threads.run(world_size, one_fails)
    assert caught.value is error
    assert error.__notes__ == [f"rank {world_size - 1} failed first, of {world_size} ranks in threads"]
    assert sorted(seen) == list(range(world_size - 1))
    assert all(f"rank {world_size - 1} failed" in text for text in seen.values())
    assert threading.active_count() == before


def test_waiting_for_a_rank_that_has_returned_is_an_error():
    def one_returns(comm):
        if comm.rank == 0:
            comm.recv(np.zeros(1), 1)

    with pytest.raises(CommError, match="rank 0 waits for a message from rank 1, which has returned"):
        threads.run(2, one_returns)


def test_a_message_sent_before_its_rank_returned_still_arrives():
    def one_returns(comm):
        if comm.rank == 1:
            comm.send(np.full(3, 7.0), 0)
            return None
        time.sleep(0.05)
        return comm.recv(np.zeros(3), 1).tolist()

    assert threads.run(2, one_returns) == [[7.0, 7.0, 7.0], None]


def test_messages_are_copied_when_they_are_sent():
    def change_it(comm):
        if comm.rank == 0:
            array = np.ones(3)
            request = comm.isend(array, 1)
            array[:] = 2
            comm.barrier()
            return request.test()
        comm.barrier()
        return comm.recv(np.zeros(3), 0).tolist()

    assert threads.run(2, change_it) == [True, [1.0, 1.0, 1.0]]


@pytest.mark.parametrize("sizes", [(3, 4), (4, 3)])
def test_a_size_that_differs_names_both_sizes_and_both_ranks(sizes):
    def differ(comm):
        array = np.zeros(sizes[comm.rank])
        comm.send(array, 1) if comm.rank == 0 else comm.recv(array, 0)

    sent, wanted = 8 * sizes[0], 8 * sizes[1]
    message = f"rank 1: received {sent} bytes from rank 0, expected {wanted}"
    with pytest.raises(CommError, match=message):
        threads.run(2, differ)


def test_a_sum_that_failed_does_not_pass_for_done():
    started = threading.Event()

    def broken(comm):
        if comm.rank == 1:
            started.wait()
            with pytest.raises(ContractError, match=r"of \(8,\) float64.*of \(4,\) float64"):
                comm.all_reduce(np.zeros(4))
            return "named"
        pending = comm.start_all_reduce(np.zeros(8))
        started.set()
        with pytest.raises(ContractError, match=r"of \(8,\) float64.*of \(4,\) float64"):
            pending.wait()
        for again in (pending.advance, pending.wait, comm.barrier):
            with pytest.raises(CommError, match=r"of \(8,\) float64.*of \(4,\) float64"):
                again()
        return "named"

    assert threads.run(2, broken) == ["named", "named"]


def test_abort_ends_all_ranks_and_the_caller():
    def abort(comm):
        comm.abort(3) if comm.rank == 1 else comm.barrier()

    with pytest.raises(SystemExit) as caught:
        threads.run(3, abort)
    assert caught.value.code == 3


REFUSED = {
    "unknown op": (lambda c: c.all_reduce(np.ones(3), "sun"), ConfigError, "'sun'; did you mean 'sum'"),
    "sum of truths": (lambda c: c.all_reduce(np.ones(3, bool)), ConfigError, "sum of bool"),
    "rank too large": (lambda c: c.send(np.ones(3), 2), CommError, "dest 2 .* 0 to 1"),
    "negative rank": (lambda c: c.recv(np.ones(3), -1), CommError, "source -1 .* 0 to 1"),
    "root": (lambda c: c.broadcast(np.ones(3), 5), CommError, "root 5 .* 0 to 1"),
    "self-send": (lambda c: c.send(np.ones(3), c.rank), CommError, "is this rank itself"),
    "self-receive": (lambda c: c.irecv(np.ones(3), c.rank), CommError, "is this rank itself"),
    "tag": (lambda c: c.send(np.ones(3), 1 - c.rank, 16384), ConfigError, "tag 16384.* 0 to 16383"),
    "list": (lambda c: c.all_reduce([1, 2]), ShapeError, "expected an array, not list"),
    "number": (lambda c: c.all_reduce(np.float32(1)), ShapeError, "expected an array, not float32"),
    "constant": (lambda c: c.broadcast(np.broadcast_to(1.0, 4)), ShapeError, "read-only"),
    "objects": (lambda c: c.all_gather(np.array([{}])), ShapeError, "not of Python objects"),
    "no axis": (lambda c: c.reduce_scatter(np.array(1.0)), ShapeError, r"shape \(\) has none"),
    "strided": (lambda c: c.recv(np.ones(4)[::2], 1 - c.rank), ShapeError, "C-contiguous"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_sent(name):
    call, kind, message = REFUSED[name]

    def refuse(comm):
        with pytest.raises(kind, match=message):
            call(comm)
        comm.barrier()
        return comm.bytes_sent

    assert threads.run(2, refuse) == [0, 0]


def test_a_rank_outside_its_world_names_both():
    with pytest.raises(CommError, match="rank 3 of world_size 2"):
        threads.ThreadCommunicator(rank=3, world_size=2, local_rank=0, world=None)


def test_alone_there_is_nobody_to_send_to():
    comm = dt_comm.connect("local")
    with pytest.raises(CommError, match="dest 0 is this rank itself"):
        comm.send(np.ones(1), 0)
    with pytest.raises(CommError, match="dest 1 is not a rank"):
        comm.send(np.ones(1), 1)
