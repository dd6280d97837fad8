"""Where a step's time goes: by the calls of its plan, and products beside NumPy's.

    taskset -c 1 python -m benchmarks.parts W1 W4 W5
    taskset -c 1 python -m benchmarks.parts products

Parts are the shortest of several runs, products the median of calls in turns; on one core.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from benchmarks import workloads
from benchmarks.systems.disttrain import compiled
from disttrain.kernels.matmul import matmul

_RUNS_S = 4.0  # of a plan
_SHAPES = (
    (128, 128, 784, "n"), (784, 128, 128, "t"), (1024, 256, 256, "n"), (1024, 1024, 256, "n"), (1024, 1024, 256, "t"),
    (256, 1024, 1024, "n"), (256, 1024, 1024, "r"), (1024, 256, 1024, "n"), (128, 64, 128, "n"), (128, 10, 128, "n"),
    (1024, 10, 256, "t"),
)  # fmt: skip


def show_parts(name: str) -> None:
    """Print the time of a workload's plan by op."""
    workload = workloads.get(name)
    model = compiled(workload)
    x, y = workload.batch()
    for _ in range(4):
        begin = time.perf_counter()
        model.train_on_batch(x, y)
        step_s = time.perf_counter() - begin
    (replica,) = model._replicas.values()
    (plan,) = replica.steps[0].training.plans.values()
    times: defaultdict[str, float] = defaultdict(float)
    for row, seconds in zip(plan.rows(), plan.times_s(max(3, int(_RUNS_S / step_s))), strict=True):
        times[row.name.split(" of ")[0]] += seconds
    print(f"{name}: {sum(times.values()) * 1e3:.3f} ms in the plan")
    for op, seconds in sorted(times.items(), key=lambda pair: -pair[1]):
        print(f"  {seconds * 1e3:9.3f} ms  {op}")


def show_products() -> None:
    """Print GFLOP/s of products, in turns with NumPy's."""
    print("m x n x k (t: left, r: right operand transposed): disttrain, NumPy, GFLOP/s")
    random = np.random.default_rng(0)
    for m, n, k, way in _SHAPES:
        a = random.random((k, m) if way == "t" else (m, k), np.float32)
        b = random.random((n, k) if way == "r" else (k, n), np.float32)
        a, b = (a.T if way == "t" else a), (b.T if way == "r" else b)
        launch = matmul(a, b)
        if launch is None:
            sys.exit("there are no kernels here")
        calls: list[Callable[[], Any]] = [launch.run, partial(np.matmul, a, b, np.empty((m, n), np.float32))]
        rates = [2e-9 * m * n * k / seconds for seconds in _in_turns(calls, max(20, int(2e9 / (m * n * k))))]
        print(f"  {m} x {n} x {k} {way}: {rates[0]:.0f}, {rates[1]:.0f}")


def _in_turns(functions: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Return the median time of each function, called in turns."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, held in zip(functions, times, strict=True):
            begin = time.perf_counter()
            function()
            held.append(time.perf_counter() - begin)
    return [float(np.median(held)) for held in times]


if __name__ == "__main__":
    for asked in sys.argv[1:] or ["W1"]:
        if asked == "products":
            show_products()
        else:
            show_parts(asked)
