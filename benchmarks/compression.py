"""What compression saves between hosts, and what it costs: sums of one bucket, and steps of W2, side by side.

Run as each rank of a job on several hosts; rank 0 prints. Kinds take turns, so that what else the machine does falls on
all of them. On hosts that are namespaces of one machine, with links of 1 Gbit/s:

    python -m tests.netns.network --hosts 2 --rate 1gbit -- python -m benchmarks.compression

By itself it prints what the casts of 16 MiB cost.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # namespaces of one machine share its cores

import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

import disttrain as dt
from disttrain.comm import encodings

KINDS = (None, "float16", "bfloat16", "int8", "powersgd", "topk")
BUCKET = 1 << 22  # elements
BATCH = 256


def casts() -> None:
    """Print milliseconds of each encoding's cast of 16 MiB of float32."""
    values = np.random.default_rng(0).standard_normal(BUCKET, np.float32)
    for name in ("float16", "bfloat16", "int8"):
        encoding = encodings.get(name)
        encoded, decoded = np.zeros(encoding.nbytes(BUCKET), np.uint8), np.zeros_like(values)
        there = _best(lambda: encoding.encode(values, encoded))  # noqa: B023 - called here
        back = _best(lambda: encoding.decode(encoded, decoded))  # noqa: B023
        print(f"{name:10} encode {there * 1e3:6.2f} ms  decode {back * 1e3:6.2f} ms")


def sums(rounds: int) -> None:
    """Print seconds of a sum of 16 MiB of float32 by each kind, and what it sends."""
    comm = dt.comm.current()
    part = dt.compression.Part(name="w", place=slice(0, BUCKET), shape=(1 << 11, 1 << 11))
    flat = comm.allocate(BUCKET)
    flat[:] = np.random.default_rng(comm.rank).standard_normal(BUCKET, np.float32)
    carriers = {
        name: kind.carrier([part], BUCKET, flat.dtype)
        for name in KINDS
        if (kind := dt.compression.get(name)) is not None
    }
    own = flat.copy()

    def run(name: str | None) -> None:
        flat[:] = own
        comm.start_all_reduce(flat, wire=carriers[name].wire if name in carriers else None).wait()

    _compare("a sum of 16 MiB", run, rounds)


def steps(rounds: int) -> None:
    """Print seconds of a step of W2, 784-1024-1024-10, by each kind, and what it sends."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((BATCH, 784), np.float32)
    y = generator.integers(0, 10, BATCH)
    models = {}
    for name in KINDS:
        dense = dt.layers.Dense
        models[name] = dt.Sequential(
            [dense(1024, activation="relu", input_shape=(784,)), dense(1024, activation="relu"), dense(10)]
        )
        models[name].compile(
            "adam",
            dt.losses.SparseCategoricalCrossentropy(from_logits=True),
            distribution=dt.DataParallel(compression=name, bucket_bytes=1 << 20),
        )
    _compare("a step of W2", lambda name: models[name].train_on_batch(x, y), rounds)


def _compare(what: str, run: Callable[[str | None], object], rounds: int) -> None:
    comm = dt.comm.current()
    seconds: dict[str | None, list[float]] = {name: [] for name in KINDS}
    sent = {}
    for number in range(rounds + 2):  # two that plan
        for name in KINDS:
            comm.barrier()
            before, begin = comm.bytes_sent, time.perf_counter()
            run(name)
            if number > 1:
                seconds[name].append(time.perf_counter() - begin)
            sent[name] = comm.bytes_sent - before
    if comm.rank == 0:
        plain = statistics.median(seconds[None])
        print(f"{what}, {comm.world_size} ranks: median ms, times as fast as without, MB sent by rank 0")
        for name, taken in seconds.items():
            median = statistics.median(taken)
            print(f"{name or 'none':10} {median * 1e3:8.1f} {plain / median:6.2f} {sent[name] / 1e6:8.2f}", flush=True)


def _best(function: Callable[[], object]) -> float:
    taken = []
    for _ in range(20):
        begin = time.perf_counter()
        function()
        taken.append(time.perf_counter() - begin)
    return min(taken)


if __name__ == "__main__":
    if dt.init().world_size == 1:
        casts()
    else:
        count = int(sys.argv[1]) if len(sys.argv) > 1 else 7
        sums(count)
        steps(count)
