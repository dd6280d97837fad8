"""The claims of `claims`, with ranks as threads and with one rank alone."""

import gc
import weakref

import numpy as np
import pytest

from disttrain import comm as dt_comm
from disttrain.comm import base, contract, pending, ring, threads
from disttrain.comm.heads import HEAD_BYTES
from disttrain.comm.pending import ROOM
from disttrain.comm.scratch import Scratch
from disttrain.errors import CommError, ConfigError, ContractError
from tests.comm import claims

WORLD_SIZES = range(1, 9)
each_world_size = pytest.mark.parametrize("world_size", WORLD_SIZES)


@each_world_size
@pytest.mark.parametrize("size", claims.SIZES)
def test_all_reduce_is_exact(world_size, size):
    def every_dtype(comm):
        for dtype in claims.DTYPES:
            for op in claims.OPS:
                claims.all_reduce_is_exact(comm, size, dtype, op)

    threads.run(world_size, every_dtype)


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_reduce_of_ten_million_elements_is_exact(world_size):
    threads.run(world_size, claims.all_reduce_is_exact, 10_000_000, "float32", "sum")


@each_world_size
@pytest.mark.parametrize(
    "claim",
    [
        claims.all_reduce_of_truths,
        claims.all_reduce_gives_the_same_bits,
        claims.all_reduce_of_views,
        claims.broadcast_from_every_root,
        claims.json_of_every_length,
        claims.messages_pass_around,
        claims.pendings_need_no_wait,
        claims.a_pending_sum_moves_while_a_message_is_awaited,
    ],
)
def test_on_any_number_of_ranks(world_size, claim):
    threads.run(world_size, claim)


@each_world_size
@pytest.mark.parametrize("size", claims.SIZES)
def test_all_reduce_counts_its_bytes_and_messages(world_size, size):
    threads.run(world_size, claims.all_reduce_of_long_arrays_counts_its_bytes, size, "float32")
    threads.run(world_size, claims.all_reduce_of_short_arrays_counts_its_messages, size, "float32")


@each_world_size
@pytest.mark.parametrize("size", claims.SIZES)
def test_halves_of_an_all_reduce(world_size, size):
    threads.run(world_size, claims.halves_of_an_all_reduce, size)


@each_world_size
@pytest.mark.parametrize("shape", [(0,), (3,), (8, 3), (13, 2, 2), (5, 0), (70_001, 5)])
def test_reduce_scatter_gives_each_its_rows(world_size, shape):
    threads.run(world_size, claims.reduce_scatter_gives_each_its_rows, shape, "sum")
    threads.run(world_size, claims.reduce_scatter_gives_each_its_rows, shape, "max")


@each_world_size
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5)])
def test_all_gather_stacks(world_size, shape):
    threads.run(world_size, claims.all_gather_stacks, shape)


@each_world_size
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pendings_interleave(world_size, seed):
    threads.run(world_size, claims.pendings_interleave, seed)


@each_world_size
@pytest.mark.parametrize("claim", claims.OF_GROUPS)
def test_groups_do_what_all_ranks_do(world_size, claim):
    threads.run(world_size, claims.in_groups, *claim)


@each_world_size
@pytest.mark.parametrize("claim", [claims.groups_are_as_asked, claims.messages_of_groups_stay_apart])
def test_groups_on_any_number_of_ranks(world_size, claim):
    threads.run(world_size, claim)


@each_world_size
@pytest.mark.parametrize("seed", range(5))
def test_groups_do_not_wait_for_each_other(world_size, seed):
    threads.run(world_size, claims.groups_do_not_wait_for_each_other, seed)


@pytest.mark.parametrize("world_size", [2, 4])
def test_groups_do_not_wait_for_each_other_when_they_have_waited_long(world_size, monkeypatch):
    monkeypatch.setattr(pending, "_MOVING_S", 0.0)
    threads.run(world_size, claims.groups_do_not_wait_for_each_other, 0)


def test_an_error_in_a_group_names_ranks_of_the_job():
    def differ(comm):
        group = comm.split(comm.rank % 2)
        group.all_reduce(np.zeros(4 + (comm.rank == 3)))

    with pytest.raises(ContractError, match=r"in the group of rank 1, .*rank 1: .*of \(4,\) .*rank 3: .*of \(5,\) "):
        threads.run(4, differ)


def test_an_error_in_a_group_says_in_which():
    def leave(comm):
        group = comm.split(comm.rank % 2)
        if comm.rank == 1:
            group.barrier()

    with pytest.raises(CommError, match="rank 1 waits for a message from rank 3") as caught:
        threads.run(4, leave)
    assert "in group 1, of the job's ranks 1, 3" in caught.value.__notes__


@pytest.mark.parametrize(("color", "key"), [(1.5, 0), ([1], 0), (0, "first"), (0, None)])
def test_a_color_is_a_number_or_a_name(color, key):
    with pytest.raises(ConfigError, match="expected a number, a string or None, and a number as key"):
        threads.run(2, lambda comm: comm.split(color, key))


def test_a_group_that_is_dropped_leaves_nothing_behind():
    def come_and_go(comm):
        group = comm.split(0)
        claims.all_reduce_is_exact(group, 1000, "float32", "sum")
        gone = weakref.ref(group)
        del group
        gc.collect()
        return gone() is None, len(comm._everywhere), comm._world

    for is_gone, under_way, world in threads.run(2, come_and_go):
        assert (is_gone, under_way, len(world.messages), len(world.receives)) == (True, 0, 0, 0)


@pytest.mark.parametrize(
    "claim",
    [
        claims.all_reduce_of_views,
        claims.json_of_every_length,
        claims.all_reduce_of_truths,
        claims.groups_are_as_asked,
    ],
)
def test_one_rank_alone_is_no_special_case(claim):
    claim(dt_comm.connect("local"))


@each_world_size
def test_no_rank_leaves_a_barrier_before_the_last_has_come(world_size):
    events = []

    def meet(comm):
        for _ in range(20):
            events.append("come")
            comm.barrier()
            events.append("leave")
            comm.barrier()

    threads.run(world_size, meet)
    for start in range(0, len(events), 2 * world_size):
        once = events[start : start + 2 * world_size]
        assert once == ["come"] * world_size + ["leave"] * world_size


class LateSend:
    """A message that is done only at the third look."""

    def __init__(self):
        self.looks = 0

    def test(self):
        self.looks += 1
        return self.looks >= 3

    def wait(self):
        self.looks = 3


@each_world_size
@pytest.mark.parametrize("size", [1000, ROOM])
def test_a_collective_ends_after_all_its_sends(world_size, size):
    # on a transport that does not copy, what is sent would be overwritten on its way
    def slow(comm):
        send, sends = comm._isend, []

        def late(array, dest, tag):
            message = send(array, dest, tag)
            if tag == contract.TAG and array.nbytes == HEAD_BYTES:  # of what goes ahead nobody else has the memory
                return message
            sends.append(LateSend())
            return sends[-1]

        comm._isend = late
        array = np.zeros(size)
        for call in (
            lambda: comm.all_reduce(array),
            lambda: comm.reduce_scatter(array),
            lambda: comm.all_gather(array),
            lambda: comm.broadcast(array),
            lambda: comm.broadcast(array, comm.world_size - 1),
            comm.barrier,
            lambda: comm.start_all_reduce(array).wait(),
        ):
            call()
            assert all(request.looks >= 3 for request in sends)
        return len(sends)

    sent = threads.run(world_size, slow)
    assert all(sent) == (world_size > 1)


def test_tags_of_collectives_wrap_and_stay_within_what_every_mpi_has():
    tags = set()

    def many(comm):
        send = comm._isend
        comm._isend = lambda array, dest, tag: (tags.add(tag), send(array, dest, tag))[1]
        comm._sequence = base._TAGS - 2
        for _ in range(4):
            claims.all_reduce_is_exact(comm, ROOM, "float32", "sum")

    threads.run(2, many)
    assert min(tags) == base.USER_TAGS
    assert max(tags) < 2 * base.USER_TAGS - 1 == 32767


def test_an_overflow_is_infinite_on_all_ranks_and_warns_on_none():
    def overflow(comm):
        return comm.all_reduce(np.full(10, 60_000, np.float16))

    assert np.isinf(threads.run(2, overflow)).all()


@pytest.mark.parametrize("hosts", [[], ["here"] * 3])
@pytest.mark.parametrize("size", [40, 48, 1003])
def test_pieces_are_summed_one_after_the_other(monkeypatch, size, hosts):
    monkeypatch.setattr(ring, "PIECE_BYTES", 64)
    lent = []

    def work(comm):
        comm.hosts = hosts
        take = comm.scratch.take
        comm.scratch.take = lambda size, dtype: (lent.append(size), take(size, dtype))[1]
        array = claims.values((size,), "float32", comm.rank)
        comm._run(ring.all_reduce(array, np.add, comm._channel("all_reduce sum", array)), "all_reduce", array)
        return np.array_equal(array, claims.expected(comm, (size,), "float32"))

    assert threads.run(3, work) == [True] * 3
    assert lent == ([14] * 3 if size == 40 else [16] * 3 if size == 48 or hosts else [16] * 6)


@pytest.mark.parametrize(("length", "parts"), [(0, 1), (0, 4), (3, 5), (10, 3), (1001, 7)])
def test_chunks_cover_the_length_evenly(length, parts):
    lengths = np.diff(ring.chunk_bounds(length, parts))
    assert lengths.size == parts
    assert lengths.sum() == length
    assert lengths.max() - lengths.min() <= 1


def test_scratch_memory_is_used_again_and_never_lent_twice():
    scratch = Scratch()
    first = scratch.take(1000, np.dtype(np.float32))
    second = scratch.take(1000, np.dtype(np.float32))
    assert first.shape == (1000,)
    assert not np.may_share_memory(first, second)
    scratch.give(first)
    assert np.may_share_memory(scratch.take(500, np.dtype(np.float64)), first)


def test_a_second_all_reduce_allocates_no_buffers():
    def memory(comm):
        array = np.ones(1_000_000, np.float32)
        comm.all_reduce(array)
        comm.barrier()
        kept = sum(len(buffers) for buffers in comm.scratch._free.values())
        comm.all_reduce(array)
        return kept, sum(len(buffers) for buffers in comm.scratch._free.values())

    assert threads.run(2, memory) == [(2, 2), (2, 2)]
