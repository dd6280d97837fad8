"""What every transport must do, on any number of ranks: run by each transport's own tests.

A claim is a function of a communicator, called on all ranks. It compares at its end, on all ranks at
once, so that no rank leaves the others in the middle of a collective.
"""

import contextlib
import math
import random
import time

import numpy as np

from disttrain.comm.costs import Costs
from disttrain.comm.heads import HEAD_BYTES
from disttrain.comm.pending import ROOM

SIZES = [0, 1, 2, 5, 7, 64, 1003, 300_007]
DTYPES = ["float16", "float32", "float64", "int64"]
OPS = {"sum": np.sum, "max": np.max, "min": np.min}


def holds(comm, *truths):
    """Assert on all ranks that `truths` hold on all ranks."""
    everywhere = comm.all_gather_json([bool(truth) for truth in truths])
    assert all(all(truths) for truths in everywhere), everywhere


def values(shape, dtype, rank):
    """Return what `rank` contributes: whole numbers, small enough for exact sums in float16."""
    index = np.arange(math.prod(shape)) * 7 + rank * rank * 11 + rank
    return (index % 13 - 6).astype(dtype).reshape(shape)


def expected(comm, shape, dtype, op="sum"):
    """Return what NumPy makes of all ranks' values."""
    everyone = np.stack([values(shape, dtype, rank) for rank in range(comm.world_size)])
    return OPS[op](everyone, axis=0).astype(dtype)


def all_reduce_is_exact(comm, size, dtype, op):
    array = values((size,), dtype, comm.rank)
    result = comm.all_reduce(array, op)
    holds(comm, result is array, np.array_equal(array, expected(comm, (size,), dtype, op)))


def all_reduce_of_truths(comm):
    mine = np.arange(10) % comm.world_size == comm.rank
    some, all_of_them = comm.all_reduce(mine.copy(), "max"), comm.all_reduce(mine.copy(), "min")
    holds(comm, some.all(), all_of_them.all() == (comm.world_size == 1))


def all_reduce_of_views(comm):
    whole = np.full((6, 8), 100.0)
    strided, transposed = whole[::2, 1::3], values((5, 4), "float64", comm.rank).T
    strided[...] = values(strided.shape, "float64", comm.rank)
    scalar = np.array(comm.rank)
    for array in (strided, transposed, scalar):
        comm.all_reduce(array)
    untouched = whole.copy()
    untouched[::2, 1::3] = 100.0
    holds(
        comm,
        np.array_equal(strided, expected(comm, strided.shape, "float64")),
        np.array_equal(transposed, expected(comm, (5, 4), "float64").T),
        scalar == sum(range(comm.world_size)),
        (untouched == 100.0).all(),
    )


LONG = Costs(latency_s=0.0, byte_s=1.0)  # where messages cost this, every array is a long one
SHORT = Costs(latency_s=1.0, byte_s=0.0)


@contextlib.contextmanager
def messages_cost(comm, costs):
    """Let `comm` choose by `costs` inside a ``with`` block, on all ranks alike."""
    before, comm.costs = comm.costs, costs
    try:
        yield
    finally:
        comm.costs = before


def all_reduce_of_long_arrays_counts_its_bytes(comm, size, dtype):
    array, before = values((size,), dtype, comm.rank), comm.bytes_sent
    with messages_cost(comm, LONG):
        comm.all_reduce(array)
    sent = comm.bytes_sent - before
    share = 2 * (comm.world_size - 1) * array.nbytes / comm.world_size
    everyone = comm.all_gather_json(sent)
    holds(
        comm,
        sum(everyone) == 2 * (comm.world_size - 1) * array.nbytes,
        # two chunks stay at home, and each is up to one element longer or shorter than the mean
        abs(sent - share) < 2 * array.itemsize,
    )


def all_reduce_of_short_arrays_counts_its_messages(comm, size, dtype):
    array, send, sent = values((size,), dtype, comm.rank), comm._isend, []

    def counted(array, dest, tag):
        sent.append(array.nbytes)
        return send(array, dest, tag)

    comm._isend = counted
    with messages_cost(comm, SHORT):
        comm.all_reduce(array)
    comm._isend = send
    rounds = comm.world_size.bit_length() - 1
    pairs = comm.world_size - (1 << rounds)  # the first of a pair gives its array to the second, which sends the sum
    expected_number = 1 if comm.rank < 2 * pairs and comm.rank % 2 == 0 else rounds + (comm.rank < 2 * pairs)
    holds(
        comm,
        # what is short goes in one message with its head
        sent == ([HEAD_BYTES + array.nbytes] if array.nbytes <= ROOM else [HEAD_BYTES, array.nbytes]) * expected_number,
        np.array_equal(array, expected(comm, (size,), dtype)),
    )


def all_reduce_gives_the_same_bits(comm):
    """The same bits on all ranks, NaNs with their payloads among them, by each algorithm."""
    mine = np.random.default_rng(comm.rank).standard_normal(10_001).astype(np.float32)
    mine.view(np.uint32)[:: 7 + comm.rank] = 0x7FC00000 + comm.rank  # a NaN that says whose it is
    for cost in (LONG, SHORT):
        with messages_cost(comm, cost):
            copies = comm.all_gather(comm.all_reduce(mine.copy()))
        holds(comm, all(copy.tobytes() == copies[0].tobytes() for copy in copies))


def encoded_sums_are_near_and_alike(comm, name):
    """What travels is rounded, by at most `p` casts of bfloat16 or int8, and once more; the same bits on all."""
    size = 70_007
    array = comm.allocate(size)
    array[:] = values((size,), "float32", comm.rank)
    comm.start_all_reduce(array, wire=name).wait()
    copies = comm.all_gather(array)
    # values are at most 6; a cast is within 2**-8 of a value, or half of 1 / 127 of the largest
    bound = (6 * comm.world_size) * 2.0**-7
    holds(
        comm,
        all(copy.tobytes() == copies[0].tobytes() for copy in copies),
        np.abs(array - expected(comm, (size,), "float32")).max() <= bound,
    )


def halves_of_an_all_reduce(comm, size):
    """reduce_scatter and all_gather in place give what an all_reduce does."""
    flat = values((size,), "float32", comm.rank)
    comm.start_reduce_scatter(flat).wait()
    first, last = size * comm.rank // comm.world_size, size * (comm.rank + 1) // comm.world_size
    flat[:first] = flat[last:] = 77
    comm.start_all_gather(flat).wait()
    holds(comm, np.array_equal(flat, expected(comm, (size,), "float32")))


def reduce_scatter_gives_each_its_rows(comm, shape, op):
    array = values(shape, "float32", comm.rank)
    mine = comm.reduce_scatter(array, op)
    first = shape[0] * comm.rank // comm.world_size
    last = shape[0] * (comm.rank + 1) // comm.world_size
    holds(
        comm,
        np.array_equal(mine, expected(comm, shape, "float32", op)[first:last]),
        mine.shape == (last - first, *shape[1:]),
        np.array_equal(array, values(shape, "float32", comm.rank)),
    )


def all_gather_stacks(comm, shape):
    gathered = comm.all_gather(values(shape, "float32", comm.rank))
    stacked = np.stack([values(shape, "float32", rank) for rank in range(comm.world_size)])
    holds(comm, gathered.shape == stacked.shape, np.array_equal(gathered, stacked))


def broadcast_from_every_root(comm):
    for root in range(comm.world_size):
        array = values((3, 17), "float64", comm.rank).T
        result = comm.broadcast(array, root)
        holds(comm, result is array, np.array_equal(array, values((3, 17), "float64", root).T))


def json_of_every_length(comm):
    value = {"rank": comm.rank, "text": "ü" * comm.rank * 1000, "pair": (1, None)}
    gathered = comm.all_gather_json(value)
    root = comm.world_size - 1
    known = comm.broadcast_json(value if comm.rank == root else object, root)
    wanted = [{"rank": rank, "text": "ü" * rank * 1000, "pair": [1, None]} for rank in range(comm.world_size)]
    holds(comm, gathered == wanted, known == wanted[root])


def messages_pass_around(comm):
    after, before = (comm.rank + 1) % comm.world_size, (comm.rank - 1) % comm.world_size
    if comm.world_size == 1:
        return
    first, second, empty = np.zeros(5), np.zeros((2, 3), np.int16), np.zeros(0)
    # the second is asked for first, and overtaken only because its tag differs
    requests = [comm.irecv(second, before, tag=2), comm.irecv(first, before, tag=1)]
    sends = [
        comm.isend(np.full(5, float(comm.rank)), after, tag=1),
        comm.isend(np.full((3, 2), comm.rank, np.int16).T, after, tag=2),
        comm.isend(empty, after),
    ]
    result = comm.recv(empty, before)
    for request in requests + sends:
        request.wait()
    done = all(request.test() for request in requests + sends)
    holds(comm, result is empty, done, (first == before).all(), (second == before).all())


def pendings_interleave(comm, seed):
    """Each rank drives its pending sums in an order of its own, with other collectives in between."""
    order = random.Random(seed * 100 + comm.rank)
    arrays = [values((size,), "float32", comm.rank) for size in (1003, 3, 0, 50_000)]
    pendings, gathered = [], []
    for array in arrays:
        pendings.append(comm.start_all_reduce(array))
        order.choice(pendings).advance()
        gathered.append(comm.all_gather(np.array([comm.rank, len(pendings)])).tolist())
        order.choice(pendings).advance()
    order.shuffle(pendings)
    for pending in pendings:
        pending.wait()
    holds(
        comm,
        all(pending.advance() for pending in pendings),
        *(np.array_equal(a, expected(comm, a.shape, "float32")) for a in arrays),
        gathered == [[[rank, n] for rank in range(comm.world_size)] for n in range(1, 5)],
    )


def pendings_need_no_wait(comm):
    """Sums end by `advance` alone, each rank beginning with another one."""
    arrays = [values((size,), "int64", comm.rank) for size in (10, 400_000, 1, 77)]
    pendings = [comm.start_all_reduce(array) for array in arrays]
    for turn in range(comm.rank, 10_000_000):
        pendings[turn % 4].advance()
        if turn % 4 == comm.rank % 4 and all(pending.advance() for pending in pendings):
            break
        time.sleep(0)  # on few cores others get their turns
    holds(comm, *(np.array_equal(a, expected(comm, a.shape, "int64")) for a in arrays))


def a_pending_sum_moves_while_a_message_is_awaited(comm):
    array, message = values((100_000,), "float32", comm.rank), np.zeros(300_000)
    pending = comm.start_all_reduce(array)
    if comm.rank == 0:
        for source in range(1, comm.world_size):
            comm.recv(message, source)
        pending.wait()
    else:
        pending.wait()
        comm.send(message + comm.rank, 0)
    holds(
        comm,
        np.array_equal(array, expected(comm, array.shape, "float32")),
        comm.rank > 0 or (message == comm.world_size - 1).all(),
    )


def groups_are_as_asked(comm):
    """Ranks are those of one color, by key and then as they were."""
    size, before = comm.world_size, comm.rank + 1
    odd = comm.split(comm.rank % 2)
    backwards = comm.split("all", key=-comm.rank)
    some = comm.split(None if comm.rank == 0 else 1, key=comm.rank // 2)
    within = backwards.split(backwards.rank // 2)
    hosts = [group.all_gather_json(comm._host) for group in (odd, backwards)]
    mine = [rank for rank in range(size) if rank % 2 == comm.rank % 2]
    pair = [rank for rank in range(size)[::-1] if (size - 1 - rank) // 2 == backwards.rank // 2]
    holds(
        comm,
        list(odd.job_ranks) == mine and mine[odd.rank] == comm.rank and odd.world_size == len(mine),
        list(backwards.job_ranks) == list(range(size))[::-1] and backwards.rank == size - before,
        (some is None) == (comm.rank == 0) and (some is None or list(some.job_ranks) == list(range(1, size))),
        list(within.job_ranks) == pair and pair[within.rank] == comm.rank,
        odd.local_rank == hosts[0][: odd.rank].count(comm._host),
        backwards.local_rank == hosts[1][: backwards.rank].count(comm._host),
        {odd.transport, backwards.transport, within.transport} == {comm.transport},
    )


def in_groups(comm, claim, *args):
    """What holds for all ranks holds for the ranks of a group, and of a group of a group."""
    claim(comm.split(comm.rank % 2, key=-comm.rank), *args)
    most = comm.split(None if comm.rank == comm.world_size - 1 else 0)
    if most is not None:
        claim(most.split("same"), *args)


def groups_do_not_wait_for_each_other(comm, seed):
    """Sums of rows, of columns and of all are under way at once; each rank waits for them in its own order."""
    order = random.Random(seed * 100 + comm.rank)
    groups = [comm.split(comm.rank // 2), comm.split(comm.rank % 2), comm]
    right = []
    for size in (3, 70_000):
        sums = []
        for group in groups:
            array = values((size,), "float32", comm.rank) if size < 10 else group.allocate(size)
            array[:] = values((size,), "float32", comm.rank)
            sums.append((group, array, group.start_all_reduce(array)))
        order.shuffle(sums)
        for _, _, pending in sums:
            pending.wait()
        for group, array, _ in sums:
            everyone = np.stack([values((size,), "float32", rank) for rank in group.job_ranks])
            right.append(np.array_equal(array, everyone.sum(axis=0)))
    # one waits in a group's collective, or for a message, while others need its part in that of all
    pending = comm.start_all_reduce(array := values((100_000,), "int64", comm.rank))
    rows = groups[0]
    if rows.rank == 0:
        gathered = rows.all_gather(np.array(comm.rank)).tolist()
        pending.wait()
    else:
        pending.wait()
        gathered = rows.all_gather(np.array(comm.rank)).tolist()
    right.append(gathered == list(rows.job_ranks))
    right.append(np.array_equal(array, expected(comm, array.shape, "int64")))
    holds(comm, *right)


def messages_of_groups_stay_apart(comm):
    """The same ranks exchange messages of the same tag in two groups, in opposite orders."""
    one, other = comm.split(0), comm.split(0)
    after, before = (comm.rank + 1) % comm.world_size, (comm.rank - 1) % comm.world_size
    if comm.world_size == 1:
        return
    first, second = np.zeros(3), np.zeros(3)
    sends = [one.isend(np.full(3, 1.0), after, 5), other.isend(np.full(3, 2.0), after, 5)]
    other.recv(second, before, 5)
    one.recv(first, before, 5)
    for send in sends:
        send.wait()
    holds(comm, (first == 1).all(), (second == 2).all(), one.bytes_sent == other.bytes_sent > 0)


# What holds for groups too, with its arguments.
OF_GROUPS = [
    (all_reduce_is_exact, 1003, "float32", "sum"),
    (all_reduce_of_truths,),
    (all_reduce_of_views,),
    (reduce_scatter_gives_each_its_rows, (13, 2, 2), "sum"),
    (all_gather_stacks, (3, 5)),
    (broadcast_from_every_root,),
    (json_of_every_length,),
    (messages_pass_around,),
    (pendings_interleave, 1),
    (pendings_need_no_wait,),
    (a_pending_sum_moves_while_a_message_is_awaited,),
]
