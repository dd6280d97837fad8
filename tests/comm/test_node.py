"""Windows of shared memory: sums in place, and arrays that lie elsewhere.

Ranks are threads here, which map memory as processes do.
"""

import gc
import itertools
import logging
import os
import resource
import signal
import time

import numpy as np
import pytest

from disttrain.comm import node, segments, threads
from disttrain.errors import CommError, ContractError
from disttrain.kernels.library import native
from tests.comm import claims

pytestmark = pytest.mark.timeout(60)

if native("start_all_reduce") is None:
    pytest.skip("no native kernels here: sums go by messages", allow_module_level=True)

each_world_size = pytest.mark.parametrize("world_size", [2, 3, 4, 7])
# around what fits in a slot as a short message, as a long one, around lines and blocks, and primes
SIZES = [0, 1, 2, 15, 16, 17, 127, 255, 256, 257, 511, 512, 513, 1009, 4099, 16383, 16384, 16385, 32768, 32769, 100_003]


def joined(function):
    """Return `function` for ranks that share a node."""

    def work(comm, *args):
        comm.join_node("here")
        assert comm._node is not None
        return function(comm, *args)

    return work


def on_node(world_size, function, *args):
    return threads.run(world_size, joined(function), *args)


def messages(comm):
    """Return how many bytes this rank has sent, in messages."""
    return comm.bytes_sent


def filled(comm, size, dtype):
    """Return an array in a window, with this rank's values."""
    array = comm.allocate(size, dtype)
    assert array.shape == (size,)
    assert array.dtype == dtype
    assert not array.any()
    assert array.ctypes.data % 64 == 0 or not size
    array[:] = claims.values((size,), dtype, comm.rank)
    return array


@each_world_size
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_sum_in_a_window_is_exact_and_needs_no_message(world_size, dtype):
    def work(comm):
        arrays = [[filled(comm, size, dtype) for op in claims.OPS] for size in SIZES]
        before, right = messages(comm), []
        for size, three in zip(SIZES, arrays, strict=True):
            for op, array in zip(claims.OPS, three, strict=True):
                result = comm.all_reduce(array, op)
                right.append(result is array and np.array_equal(array, claims.expected(comm, (size,), dtype, op)))
        return all(right), messages(comm) - before

    assert on_node(world_size, work) == [(True, 0)] * world_size


@each_world_size
@pytest.mark.parametrize("dtype", ["float32", "int64"])
def test_the_ranks_of_a_group_share_memory(world_size, dtype):
    def work(comm):
        group = comm.split(comm.rank % 2, key=-comm.rank)
        array = filled(group, 1009, dtype)
        before = group.bytes_sent
        group.all_reduce(array)
        claims.in_groups(comm, claims.all_reduce_is_exact, 1009, dtype, "max")
        claims.groups_do_not_wait_for_each_other(comm, 0)
        is_silent = group.bytes_sent == before or dtype == "int64"
        return np.array_equal(array, claims.expected(group, (1009,), dtype)) and is_silent

    assert on_node(world_size, work) == [True] * world_size


def test_a_group_whose_ranks_differ_names_them_by_their_ranks_in_the_job():
    def work(comm):
        comm.split(comm.rank % 2).all_reduce(np.zeros(100 + (comm.rank == 3), np.float32))

    words = r"in the group of rank 1, .*rank 1: .*of \(100,\) float32, .*rank 3: .*of \(101,\) float32, "
    with pytest.raises(ContractError, match=words):
        on_node(4, work)


@each_world_size
@pytest.mark.parametrize("size", claims.SIZES)
def test_all_reduce_is_exact_wherever_arrays_lie(world_size, size):
    def work(comm):
        for dtype in claims.DTYPES:
            for op in claims.OPS:
                claims.all_reduce_is_exact(comm, size, dtype, op)

    on_node(world_size, work)


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
def test_the_claims_hold_on_a_node(world_size, claim):
    on_node(world_size, claim)


@each_world_size
@pytest.mark.parametrize("seed", range(3))
def test_pendings_interleave(world_size, seed):
    on_node(world_size, claims.pendings_interleave, seed)


@each_world_size
@pytest.mark.parametrize("who", ["one rank", "all but one", "all"])
@pytest.mark.parametrize("size", [100, 10_000, 100_000, 1_000_003])
def test_ranks_whose_arrays_lie_in_different_places_sum_all_the_same(world_size, who, size):
    def work(comm):
        first, second = filled(comm, size, "float32"), filled(comm, size, "float32")
        elsewhere = {"one rank": comm.rank == 0, "all but one": comm.rank > 0, "all": True}[who]
        array = np.array(first) if elsewhere else second if comm.rank % 2 else first
        before = messages(comm)
        comm.all_reduce(array)
        sent = messages(comm) - before
        claims.holds(comm, sent == 0, np.array_equal(array, claims.expected(comm, (size,), "float32")))

    on_node(world_size, work)


def test_slices_of_a_window_leave_the_rest_alone():
    def work(comm):
        array = filled(comm, 100_000, "float32")
        before = array.copy()
        for start, stop in [(0, 5), (7, 40_011), (40_011, 90_000)]:
            comm.all_reduce(array[start:stop])
        total = claims.expected(comm, array.shape, "float32")
        total[5:7], total[90_000:] = before[5:7], before[90_000:]
        claims.holds(comm, np.array_equal(array, total))

    on_node(3, work)


def test_an_array_that_is_not_aligned_to_its_elements_is_summed_all_the_same():
    def work(comm):
        array = comm.allocate(400_001, np.uint8)[1:].view(np.float32)
        assert not array.flags.aligned
        array[:] = claims.values(array.shape, "float32", comm.rank)
        comm.all_reduce(array)
        claims.holds(comm, np.array_equal(array, claims.expected(comm, array.shape, "float32")))

    on_node(2, work)


@each_world_size
@pytest.mark.parametrize("size", [50, 5000, 50_000, 300_000])
def test_the_bits_are_those_of_a_sum_in_the_order_of_ranks(world_size, size):
    everyone = np.random.default_rng(size).standard_normal((world_size, size)).astype(np.float32)
    total = everyone[0].copy()
    for other in everyone[1:]:
        total += other

    def work(comm):
        window = comm.allocate(size)
        window[:] = everyone[comm.rank]
        return comm.all_reduce(window).tobytes(), comm.all_reduce(everyone[comm.rank].copy()).tobytes()

    expected = total.tobytes(), total.tobytes()
    assert on_node(world_size, work) == [expected] * world_size


@pytest.mark.parametrize("op", ["sum", "max", "min"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_is_not_finite_arrives_as_in_numpy(op, dtype):
    special = np.array([np.nan, np.inf, -np.inf, 0.0, 1.0], dtype)
    a, b = (np.array(each) for each in zip(*itertools.product(special, special), strict=True))
    a, b = np.tile(a, 50), np.tile(b, 50)
    with np.errstate(invalid="ignore"):
        expected = {"sum": np.add, "max": np.maximum, "min": np.minimum}[op](a, b)

    def work(comm):
        return comm.all_reduce((b if comm.rank else a).copy(), op)

    for result in on_node(2, work):
        np.testing.assert_array_equal(result, expected)


def test_more_sums_in_flight_than_there_are_slots_by_ranks_that_come_late():
    def work(comm):
        sizes = [(7 * i * i + i) % 60_000 for i in range(40)]
        arrays = [filled(comm, size, "float32") for size in sizes]
        for _ in range(3):
            for size, array in zip(sizes, arrays, strict=True):
                array[:] = claims.values((size,), "float32", comm.rank)
            time.sleep(0.02 * comm.rank)
            pendings = [comm.start_all_reduce(array) for array in arrays]
            order = np.random.default_rng(comm.rank).permutation(len(pendings))
            for at in order:
                pendings[at].advance()
            for at in order:
                pendings[at].wait()
            claims.holds(
                comm, *(np.array_equal(a, claims.expected(comm, a.shape, "float32")) for a in arrays)
            )  # fmt: skip

    on_node(3, work)


def test_long_arrays_outside_of_windows_take_turns_however_they_are_moved_on():
    def work(comm):
        sizes = [400_000, 3, 40_000, 1_300_000, 40_001, 0, 5000, 90_000, 7, 600_000, 33_000, 100_000]
        inside = [filled(comm, size, "float32") for size in sizes]
        for turn in range(3):
            arrays = [
                array if (at + turn) % 3 == 0 else np.empty_like(array) for at, array in enumerate(inside)
            ]  # fmt: skip
            for array in arrays:
                array[:] = claims.values(array.shape, "float32", comm.rank)
            pendings = [comm.start_all_reduce(array) for array in arrays]
            order = np.random.default_rng(comm.rank + turn).permutation(len(pendings))
            for at in order[::-1]:
                pendings[at].advance()
            for at in order:
                pendings[at].wait()
            claims.holds(
                comm, *(np.array_equal(a, claims.expected(comm, a.shape, "float32")) for a in arrays)
            )  # fmt: skip

    on_node(3, work)


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize(
    ("mine", "other", "words"),
    [
        (np.zeros(5), np.zeros(6), r"all_reduce sum of \(5,\) float64, .*all_reduce sum of \(6,\) float64, "),
        (np.zeros(5, "f4"), np.zeros(5), r"all_reduce sum of \(5,\) float32, .*all_reduce sum of \(5,\) float64, "),
        (np.zeros(5), np.zeros(5, "i4"), r"all_reduce sum of \(5,\) float64, .*all_reduce sum of \(5,\) int32, "),
        (np.zeros(70_000), np.zeros(5), r"all_reduce sum of \(70000,\) float64, .*all_reduce sum of \(5,\) float64, "),
    ],
)
def test_ranks_that_differ_are_told_on_all_ranks_and_go_no_further(blocking, mine, other, words):
    def work(comm):
        array = (other if comm.rank == 1 else mine).copy()
        for _ in range(2):
            with pytest.raises(ContractError, match=words):
                comm.all_reduce(array) if blocking else comm.start_all_reduce(array).wait()
        return True

    assert on_node(3, work) == [True] * 3


def test_waiting_for_a_rank_that_has_ended_is_an_error():
    def work(comm):
        if comm.rank == 0:
            comm.all_reduce(np.zeros(5))

    with pytest.raises(CommError, match="rank 1 has left the job"):
        on_node(2, work)


def test_ranks_that_allocate_different_sizes_are_told():
    def work(comm):
        comm.allocate(10 + comm.rank)

    with pytest.raises(CommError, match="rank 0 40 bytes, rank 1 44"):
        on_node(2, work)


def test_a_window_is_given_up_when_all_ranks_have_dropped_it():
    def segments_mapped():
        gc.collect()
        with open("/proc/self/maps") as file:
            return {line.split()[5] for line in file if "/memfd:disttrain" in line}

    gc.collect()
    before = segments_mapped()

    def work(comm):
        kept, kept_longer, counts = comm.allocate(5000), None, []
        for turn in range(4):
            array = comm.allocate(3000)[100:]  # a view holds it as well
            array[:] = comm.rank + turn
            kept[:] = 1
            comm.all_reduce(array)
            comm.all_reduce(kept)
            assert (array == 1 + 2 * turn).all()
            assert (kept == 2).all()
            kept_longer = array if comm.rank == 0 and turn >= 2 else None
            del array
            comm.barrier()
            counts.append(len(segments_mapped() - before))
            comm.barrier()
        return counts, kept_longer is not None

    # of two ranks: slots, what is kept, and one turn's window; that of turn 2 is there until turn 3 was allocated
    assert on_node(2, work) == [([6, 6, 6, 8], True), ([6, 6, 6, 8], False)]
    assert segments_mapped() <= before


def test_memory_that_cannot_be_had_is_one_warning_and_the_sums_are_the_same(monkeypatch, caplog):
    reserve = os.posix_fallocate

    def full(fd, offset, length):
        if length == 4 * 50_000:
            raise OSError(28, "No space left on device")
        reserve(fd, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", full)

    def work(comm):
        arrays = [filled(comm, size, "float32") for size in (50_000, 50_000, 60_000)]
        before = messages(comm)
        comm.all_reduce(arrays[2])
        without = messages(comm) - before
        for array in arrays[:2]:
            comm.all_reduce(array)
        claims.holds(comm, *(np.array_equal(a, claims.expected(comm, a.shape, "float32")) for a in arrays))
        return without

    with caplog.at_level(logging.WARNING, logger="disttrain"):
        assert on_node(2, work) == [0, 0]
    assert [record.message for record in caplog.records] == [
        "sums over ranks are formed by messages, slower than in shared memory: rank 0 cannot share 200000 bytes of "
        "memory: that of rank 0: [Errno 28] No space left on device"
    ]


def test_a_node_without_shared_memory_is_no_node(monkeypatch, caplog):
    monkeypatch.delattr(os, "memfd_create")

    def work(comm):
        assert node.join([0, 1], comm.rank, comm.all_gather_json, lambda rank: False) is None
        claims.all_reduce_is_exact(comm, 1000, "float32", "sum")

    with caplog.at_level(logging.WARNING, logger="disttrain"):
        threads.run(2, work)
    (record,) = caplog.records
    assert "this system has no memfd_create" in record.message


def test_memory_beyond_a_limit_is_an_error_and_no_signal():
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(segments.SegmentsError, match="rank 0 cannot share 1048576 bytes of memory"):
            segments.share(1 << 20, lambda value: [value], [0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    "place", [[1, 0, "disttrain-x"], [os.getpid(), 0, "disttrain-x"], [2**22 + 1, 3, "disttrain-x"]]
)
def test_what_is_not_the_segment_that_was_announced_is_not_mapped(place):
    # as where a process id is that of another container, or of another host
    calls = []

    def exchange(value):
        calls.append(value)
        return [place, value] if len(calls) == 1 else [value, ""]

    with pytest.raises(segments.SegmentsError, match="rank 5 cannot share 4096 bytes of memory: "):
        segments.share(4096, exchange, [5, 8])


def test_segments_have_no_name_and_belong_to_this_user():
    before = set(os.listdir("/dev/shm"))
    modes = []

    def exchange(value):
        if isinstance(value, list):
            modes.append(oct(os.fstat(value[1]).st_mode & 0o777))
        assert set(os.listdir("/dev/shm")) <= before
        return [value]

    segments.share(4096, exchange, [0])
    assert modes == ["0o600"]
