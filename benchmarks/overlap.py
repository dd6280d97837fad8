"""How much of the sums between hosts hides behind backward: steps of W2, and what they consist of, side by side.

Run as each rank of a job on several hosts; rank 0 prints. On hosts that are namespaces of one machine, with links of
1 Gbit/s:

    python -m tests.netns.network --hosts 2 --rate 1gbit -- python -m benchmarks.overlap

All take turns, so that what else the machine does falls on all of them.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # namespaces of one machine share its cores

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import disttrain as dt
from benchmarks import workloads
from benchmarks.systems.disttrain import compiled
from disttrain.comm import local


def measure(rounds: int, size: int) -> None:
    """Measure with `size` samples a rank, and print on rank 0."""
    comm = dt.init()
    workload = workloads.get("W2")
    own = [part[:size] for part in workload.batch()]
    x, y = (np.concatenate([part] * comm.world_size) for part in own)

    def training(**distribution: Any) -> Callable[[], object]:
        model = compiled(workload, distribution=dt.DataParallel(**distribution))
        return lambda: model.train_on_batch(x, y)

    model = compiled(workload)
    alone = local.connect()

    def compute() -> None:
        with dt.comm.use(alone):
            model.train_on_batch(*own)

    compute()
    gradient = comm.allocate(sum(weight.size for weight in model.trainable_weights))
    parts: dict[str, Callable[[], object]] = {
        "compute alone": compute,
        "sums alone": lambda: comm.all_reduce(gradient),
        "step": training(),
        "step, buckets of 4 MiB": training(bucket_bytes=1 << 22),
        "step, one bucket": training(bucket_bytes=1 << 40),
        "step, bfloat16": training(compression="bfloat16"),
    }
    taken: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(rounds + 4):  # of which four settle: two plan, and the third has other buckets
        for name, part in parts.items():
            comm.barrier()
            begin = time.perf_counter()
            part()
            if number > 3:
                taken[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(seconds) for name, seconds in taken.items()}
    if comm.rank == 0:
        bound = max(medians["compute alone"], medians["sums alone"])
        link = f"{comm.costs.latency_s * 1e6:.0f} us and {1e-6 / comm.costs.byte_s:.0f} MB/s"
        print(f"W2, {comm.world_size} ranks, {size} samples each, {gradient.nbytes / 1e6:.1f} MB, messages of {link}")
        print("median ms, ratio to the longer of both parts")
        for name, median in medians.items():
            print(f"{name:24} {median * 1e3:8.1f} {median / bound:6.2f}", flush=True)


if __name__ == "__main__":
    for samples in (256, 128, 64):
        measure(int(sys.argv[1]) if len(sys.argv) > 1 else 15, samples)
