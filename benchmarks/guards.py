"""What the guards among ranks cost a step: `disttrain run -n 2 --launcher local benchmarks/guards.py`.

Steps of W2 with and without them take turns, in one process for each rank. Without: no call is noted or named, and
weights are never compared. What the kernel compares in a node's memory stays: two words of a line that it reads anyway.
The same with and without the clock by which each rank adds up what it spends its time on.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np

import disttrain as dt
from benchmarks import workloads
from benchmarks.systems.disttrain import compiled
from disttrain import progress
from disttrain.comm import base, contract, node
from disttrain.training.drift import Guard

_TURNS, _EVERY = 300, 50


@contextlib.contextmanager
def unguarded() -> Iterator[None]:
    """Make collectives without the contract, inside a ``with`` block."""
    nothing = contract.Call(0, "all_reduce sum", "", (), "", 0, "")
    with (
        mock.patch.object(base, "called", return_value=nothing),
        mock.patch.object(contract.Contract, "begin"),
        mock.patch.object(node, "_digest", return_value=0),
    ):
        yield


@contextlib.contextmanager
def unclocked() -> Iterator[None]:
    """Add up no time, inside a ``with`` block."""

    def turn(place: int) -> None:
        progress._place = place

    with mock.patch.object(progress, "_spend", turn):
        yield


def main() -> None:
    """Measure, and print on rank 0."""
    comm = dt.init()
    workload = workloads.get("W2")
    model = compiled(workload)
    x, y = workload.batch()
    for _ in range(4):
        model.train_on_batch(x, y)
    (replica,) = model._replicas.values()
    batch = model._batches(x, y, len(x), shuffle=False).batch(0, 0)

    def step_s(without: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext) -> float:
        with without():
            comm.barrier()
            begin = time.perf_counter()
            replica.train(batch)
            return time.perf_counter() - begin

    replica.guard = Guard(every=0)
    turns = [[step_s(), step_s(unguarded), step_s(unclocked)] for _ in range(_TURNS)]
    replica.guard = Guard(every=_EVERY)
    checks = []
    for _ in range(_TURNS):
        comm.barrier()
        begin = time.perf_counter()
        replica.check()
        checks.append(time.perf_counter() - begin)
    if comm.rank == 0:
        # what other programs on these cores take is not the guards'
        whole, bare, timeless = np.quantile(turns, 0.1, axis=0)
        check_s = np.quantile(checks, 0.1)
        print(f"W2, {comm.world_size} ranks, of {_TURNS} steps of each kind the tenth part that is fastest:")
        print(f"a step {bare * 1e3:.2f} ms, with the contract {whole / bare:.4f} of that")
        print(f"with the clock {whole / timeless:.4f} of a step without")
        print(
            f"a comparison of all weights {check_s * 1e3:.3f} ms: {check_s / _EVERY / bare:.2%} of a step each {_EVERY}"
        )


if __name__ == "__main__":
    main()
