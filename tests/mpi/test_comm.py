"""The claims of `tests.comm.claims` among processes, on as many ranks as the launcher has started."""

import gc
import pathlib
import time

import numpy as np
import psutil
import pytest

from disttrain import comm as dt_comm
from disttrain import env
from disttrain.errors import CommError
from tests.comm import claims

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("size", claims.SIZES)
@pytest.mark.parametrize("dtype", claims.DTYPES)
@pytest.mark.parametrize("op", claims.OPS)
def test_all_reduce_is_exact(comm, size, dtype, op):
    claims.all_reduce_is_exact(comm, size, dtype, op)


def test_all_reduce_of_ten_million_elements_is_exact(comm):
    claims.all_reduce_is_exact(comm, 10_000_000, "float32", "sum")


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
def test_holds_among_processes(comm, claim):
    claim(comm)


@pytest.mark.parametrize("size", claims.SIZES)
def test_all_reduce_counts_its_bytes_and_messages(comm, size):
    # in messages: floats may need none
    claims.all_reduce_of_long_arrays_counts_its_bytes(comm, size, "int64")
    claims.all_reduce_of_short_arrays_counts_its_messages(comm, size, "int64")


@pytest.mark.parametrize("shape", [(0,), (3,), (8, 3), (13, 2, 2), (5, 0), (70_001, 5)])
@pytest.mark.parametrize("op", claims.OPS)
def test_reduce_scatter_gives_each_its_rows(comm, shape, op):
    claims.reduce_scatter_gives_each_its_rows(comm, shape, op)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "int8"])
def test_encoded_sums_are_near_and_alike(comm, name):
    claims.encoded_sums_are_near_and_alike(comm, name)


@pytest.mark.parametrize("size", claims.SIZES)
def test_halves_of_an_all_reduce(comm, size):
    claims.halves_of_an_all_reduce(comm, size)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5)])
def test_all_gather_stacks(comm, shape):
    claims.all_gather_stacks(comm, shape)


@pytest.mark.parametrize("seed", range(5))
def test_pendings_interleave(comm, seed):
    claims.pendings_interleave(comm, seed)


@pytest.mark.parametrize("claim", claims.OF_GROUPS)
def test_groups_do_what_all_ranks_do(comm, claim):
    claims.in_groups(comm, *claim)


@pytest.mark.parametrize("claim", [claims.groups_are_as_asked, claims.messages_of_groups_stay_apart])
def test_groups_among_processes(comm, claim):
    claim(comm)


@pytest.mark.parametrize("seed", range(5))
def test_groups_do_not_wait_for_each_other(comm, seed):
    claims.groups_do_not_wait_for_each_other(comm, seed)


def test_groups_that_are_dropped_leave_no_memory_and_no_communicators_of_mpi(comm):
    def descriptors_and_maps():
        gc.collect()
        comm.barrier()
        maps = [line for line in pathlib.Path("/proc/self/maps").read_text().splitlines() if "memfd" in line]
        return len(list(pathlib.Path("/proc/self/fd").iterdir())), len(maps)

    before = descriptors_and_maps()
    for _ in range(50):
        group = comm.split(comm.rank % 2)
        group.split(0)
        group.all_reduce(group.allocate(1000))
        group = None
        gc.collect()
    kept = len(getattr(comm, "_splits", {}))
    claims.holds(comm, descriptors_and_maps() == before, kept <= 4)  # those of the last turns are freed by the next


def test_the_ranks_are_those_of_the_launcher(comm):
    place, hosts = env.place(), comm.all_gather_json(env.host())
    claims.holds(
        comm,
        comm is dt_comm.init() is dt_comm.current(),
        (comm.rank, comm.world_size) == (place.rank, place.world_size),
        comm.local_rank == hosts[: comm.rank].count(hosts[comm.rank]),
    )


def test_the_ranks_are_those_of_mpi(comm):
    if comm.transport != "mpi":
        pytest.skip("these ranks do without MPI")
    from mpi4py import MPI

    claims.holds(comm, (comm.rank, comm.world_size) == (MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size))


def test_no_rank_leaves_a_barrier_before_the_last_has_come(comm):
    late_s = 0.05 * (comm.rank == comm.world_size - 1)
    time.sleep(late_s)
    came = time.monotonic()
    comm.barrier()
    left = time.monotonic()
    times = comm.all_gather(np.array([came, left]))
    claims.holds(comm, times[:, 1].min() >= times[:, 0].max())


def test_a_rank_that_waits_leaves_its_core_to_others(comm):
    comm.barrier()
    used = time.process_time()
    if comm.rank == 0:
        time.sleep(0.5)
    comm.barrier()
    claims.holds(comm, time.process_time() - used < 0.25)


@pytest.mark.parametrize("sizes", [(3, 4), (4, 3), (3_000_000, 4_000_000), (4_000_000, 3_000_000)])
def test_a_size_that_differs_names_sizes_and_ranks(comm, sizes):
    sent, wanted = sizes
    problem = "as it should"
    if comm.rank == 1:
        comm.send(np.zeros(sent, np.uint8), 0)
    if comm.rank == 0 and comm.world_size > 1:
        arrived = "more" if sent > wanted and comm.transport == "mpi" else str(sent)  # MPI does not say how many
        try:
            comm.recv(np.zeros(wanted, np.uint8), 1)
            problem = "no error"
        except CommError as error:
            text = f"rank 0: message from rank 1 has {arrived} bytes, expected {wanted};"
            if text not in str(error):
                problem = str(error)
    assert comm.all_gather_json(problem) == ["as it should"] * comm.world_size


@pytest.mark.timeout(110)
def test_more_than_two_gib_in_one_array(comm):
    size = 2**31 + 8
    needed = 1.3 * size * comm.world_size
    available = comm.broadcast_json(psutil.virtual_memory().available)
    if comm.world_size > 2:
        pytest.skip("more than 2 ranks on 2 cores take too long")
    if available < needed:
        pytest.skip(f"{available / 2**30:.1f} GiB of memory are free, {needed / 2**30:.1f} needed")
    array = np.full(size, comm.rank + 1, np.int8)
    array[-1] = 10 * (comm.rank + 1)
    before = comm.bytes_sent
    comm.all_reduce(array)
    sent = comm.bytes_sent - before
    total = comm.world_size * (comm.world_size + 1) // 2
    summed = (int(array.min()), int(array[:-1].max()), int(array[-1]))

    # and as one message, which goes in parts of 1 GiB
    array[:] = comm.rank
    array[::1_000_003] = 7 * (comm.rank + 1)
    root = comm.world_size - 1
    comm.broadcast(array, root)
    marks = int((array[::1_000_003] == 7 * (root + 1)).sum())
    others = int((array == root).sum())
    claims.holds(
        comm,
        summed == (total, total, 10 * total),
        sent == 2 * (comm.world_size - 1) * size // comm.world_size,
        marks == len(range(0, size, 1_000_003)),
        others == size - marks,
    )
