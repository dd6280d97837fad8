"""Collectives that one rank makes in another way than the others, and how each ends: on all ranks, with the same words.

A cell is a pair of functions of a communicator, for the odd rank and for all others, and what differs.
"""

import time

import numpy as np

from disttrain.comm import contract
from disttrain.errors import CommError, ContractError

LIMIT_S = 20.0  # of a cell; about a second on a machine that does nothing else


def large(comm, size=100_000):
    """Return an array that is summed where it lies, in a window, if there are windows."""
    array = comm.allocate(size, np.float32)
    array[:] = 1
    return array


def in_order(*names):
    def calls(comm):
        for name in names:
            comm.all_reduce(np.ones(5), name=name)

    return calls


def started(size):
    def calls(comm):
        arrays = [np.ones(n) for n in (3, size, 7)]
        for pending in [comm.start_all_reduce(array) for array in arrays]:
            pending.wait()

    return calls


def times(count, call):
    def calls(comm):
        for _ in range(count):
            call(comm)
        comm.all_gather(np.arange(3))

    return calls


def ones(*shape, dtype="float32"):
    return lambda comm: comm.all_reduce(np.ones(shape, dtype))


def barrier(comm):
    comm.barrier()


def broadcast(root, size=5):
    return lambda comm: comm.broadcast(np.ones(size, np.float32), root)


def busy(comm):
    """Send, and hear nothing for longer than others wait for what this rank may have to say."""
    broadcast(comm.rank)(comm)
    time.sleep(1.5 * contract._SETTLE_S)


CELLS = {
    "size": (ones(6), ones(5), "shape"),
    "shape": (ones(2, 3), ones(3, 2), "shape"),
    "dimensions": (ones(6), ones(3, 2), "shape"),
    "size of what is long": (ones(100_001), ones(100_000), "shape"),
    "size of integers": (ones(7, dtype="int64"), ones(5, dtype="int64"), "shape"),
    "dtype": (ones(5, dtype="int32"), ones(5), "dtype"),
    "dtype and bytes": (ones(3, dtype="float64"), ones(6), "dtype and shape"),
    "dtype of integers": (ones(5, dtype="uint64"), ones(5, dtype="int64"), "dtype"),
    "dtype that no kernel knows": (ones(5, dtype="longdouble"), ones(5, dtype="clongdouble"), "dtype"),
    "operation": (lambda c: c.all_reduce(np.ones(5), "max"), ones(5, dtype="float64"), "operation"),
    "operation on integers": (lambda c: c.all_reduce(np.ones(5, int), "min"), ones(5, dtype="int64"), "operation"),
    "order": (in_order("b", "a"), in_order("a", "b"), "name"),
    "long names": (in_order("x" * 2000 + "1"), in_order("x" * 2000 + "2"), "name"),
    "order of sums under way": (started(5), started(4), "shape"),
    "missing call": (times(2, ones(5)), times(3, ones(5)), "operation and dtype and shape"),
    "extra call": (times(3, ones(5)), times(2, ones(5)), "operation and dtype and shape"),
    "missing barrier": (times(0, barrier), times(1, barrier), "operation and dtype and shape"),
    "sum against broadcast": (ones(5), broadcast(0), "operation"),
    "broadcast against sum": (broadcast(0), ones(5), "operation"),
    "sum against barrier": (ones(0), barrier, "operation"),
    "barrier against broadcast": (barrier, broadcast(1), "operation and shape"),
    "root": (broadcast(1), broadcast(0), "operation"),
    "size of a broadcast": (broadcast(0, 6), broadcast(0, 5), "shape"),
    "reduce_scatter against all_gather": (
        lambda c: c.reduce_scatter(np.ones(6)),
        lambda c: c.all_gather(np.ones(6)),
        "operation",
    ),
    "reduce_scatter against all_reduce": (
        lambda c: c.reduce_scatter(np.ones(6)),
        ones(6, dtype="float64"),
        "operation",
    ),
    "rows of an all_gather": (lambda c: c.all_gather(np.ones(6)), lambda c: c.all_gather(np.ones(5)), "shape"),
    "a rank that is busy": (busy, lambda c: c.all_gather(np.ones(5, np.float32)), "operation"),
    "json against all_gather": (
        lambda c: c.all_gather_json([1, 2]),
        lambda c: c.all_gather(np.ones(5)),
        "operation and dtype and shape",
    ),
}


def differ(comm, name, odd, prepare=lambda comm: None):
    """Return what the cell `name` ends with on this rank: an error, and after how many seconds."""
    of_odd, of_others, _ = CELLS[name]
    begin, said = time.monotonic(), None
    try:
        prepare(comm)
        (of_odd if comm.rank == odd else of_others)(comm)
        comm.all_reduce(np.zeros(1))  # who has got through so far hears it here
    except CommError as error:
        said = [type(error).__name__, str(error)]
    return said, time.monotonic() - begin


def holds(results, name, odd):
    """Assert that all ranks, whose `results` these are, have said the same."""
    what = CELLS[name][2]
    (said, _), *others = results
    assert said is not None
    kind, text = said
    assert [each for each, _ in others] == [said] * len(others)
    assert kind == ContractError.__name__
    assert f"the {what} differs: " in text, text
    assert f"rank {odd}: call " in text
    assert text.count(f", at {__file__}:") == 2, text
    assert all(time_s < LIMIT_S for _, time_s in results)
