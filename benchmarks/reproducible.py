"""What a reproducible step costs, and how long it takes to find one's place in an epoch.

    python -m benchmarks.reproducible W2 W3 W4 W5
    mpiexec -n 2 python -m benchmarks.reproducible W2 W3 W4 W5
    python -m benchmarks.reproducible place

Steps with and without take turns in one process, on the same batch; the figures are medians of times, and of ratios of
neighbours.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import sys
import time
from collections.abc import Callable

import numpy as np

import disttrain as dt
from benchmarks import workloads
from benchmarks.systems.disttrain import compiled
from disttrain.data import Batches

_SECONDS = 10.0  # for each workload
_SHARDS = 8
_SAMPLES = 10**9


def show_cost(name: str) -> None:
    """Print the times of a workload's steps, in shards and without."""
    comm, workload = dt.init(), workloads.get(name)
    x, y = workload.batch()
    steps = [_step(compiled(workload), x, y, shards) for shards in (None, _SHARDS)]
    times: list[list[float]] = [[], []]
    end_s = time.monotonic() + _SECONDS
    while comm.broadcast(np.array(time.monotonic() < end_s or len(times[0]) < 3)):
        for step, held in zip(steps, times, strict=True):
            comm.barrier()
            begin = time.perf_counter()
            step()
            comm.barrier()
            held.append(time.perf_counter() - begin)
    if comm.rank == 0:
        plain, reproducible = np.array(times) * 1e3
        print(
            f"{name}, {comm.world_size} worker(s): {np.median(plain):.2f} ms, reproducible in {_SHARDS} shards "
            f"{np.median(reproducible):.2f} ms, ratio {np.median(reproducible / plain):.3f}, of {len(plain)} steps",
            flush=True,
        )


def show_place() -> None:
    """Print how long the first batch takes of a run that goes on in the middle of an epoch of a billion samples."""
    x = np.broadcast_to(np.zeros((1, 4), np.float32), (_SAMPLES, 4))
    times = []
    for epoch in range(50):
        batches = Batches(x, x[:, 0], batch_size=256, shuffle=True, seed=epoch, rank=1, world_size=4)
        begin = time.perf_counter()
        next(batches.epoch(epoch, batches.steps_per_epoch // 2))
        times.append(time.perf_counter() - begin)
    print(f"first batch in the middle of an epoch of {_SAMPLES:.0e} samples: {np.median(times) * 1e3:.2f} ms")


def _step(model: dt.Model, x: np.ndarray, y: np.ndarray, shards: int | None) -> Callable[[], object]:
    model.fit(x, y, batch_size=len(x), epochs=4, verbose=0, shards=shards)
    (replica,) = model._replicas.values()
    batch = model._batches(x, y, len(x), shuffle=False).batch(0, 0)
    return lambda: replica.train(batch)


if __name__ == "__main__":
    for asked in sys.argv[1:] or ["W2", "W3", "W4", "W5"]:
        if asked == "place":
            show_place()
        else:
            show_cost(asked)
