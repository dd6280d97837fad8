"""The job of `disttrain bench allreduce`: every rank sums arrays over the ranks in several ways, which take turns.

Each rank fills its array before each call, as training does. A call takes as long as on the slowest rank; given is the
median. `algbw` is bytes over time, `busbw` that times 2 (p-1)/p, which is comparable over numbers of ranks p. Source of
columns and formulas: NVIDIA, nccl-tests, doc/PERFORMANCE.md.

The ceiling is a pass over the own array in place, by all ranks at once: a rank that sums its part of p arrays of n
bytes in place reads p (n/p) bytes and writes as many, and so does the pass; docs/performance.md derives it. A copy of
as many bytes stands beside it. Both end when all ranks have done theirs, as a sum does: ranks that share a core take
turns.
"""

import importlib.util
import json
import os
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import disttrain as dt
from benchmarks import machine
from disttrain import env
from disttrain.comm import costs, tcp

Array = np.ndarray[Any, Any]
Method = tuple[Array, Callable[[Array], Any]]  # an array to fill, and what sums it over the ranks

CEILING = "pass in place"
NO_SUMS = (CEILING, "memory copy")
OURS = "disttrain"
_ROUND_S = 0.1  # of each method and size, in each round
_MOST_CALLS = 200  # in a round
_HEADINGS = ("method", "size", "count", "type", "redop", "time", "algbw", "busbw", "#wrong", "ratio")
_UNITS = ("", "(B)", "(elements)", "", "", "(us)", "(GB/s)", "(GB/s)", "", "")


def measure(comm: dt.comm.Communicator, sizes: Sequence[int], rounds: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Return a row for each size and method, and what cannot be measured here. All ranks call this.

    Args:
        comm: over MPI.
        sizes: bytes of an array.
        rounds: of turns; at least 1.
    """
    methods, gaps = _methods(comm, max(sizes) // 4)
    rows = []
    for size in sizes:
        count = size // 4
        calls = {name: calls_in_round(comm, array[:count], call) for name, (array, call) in methods.items()}
        mistakes = {
            name: wrong(comm, array[:count], call) for name, (array, call) in methods.items() if name not in NO_SUMS
        }
        taken: dict[str, list[float]] = {name: [] for name in methods}
        for _ in range(rounds):
            for name, (array, call) in methods.items():
                taken[name] += times(comm, array[:count], call, calls[name])
        rows += [row(name, size, comm.world_size, taken, mistakes.get(name)) for name in methods]
    return rows, gaps


def row(
    name: str, size: int, world_size: int, taken: Mapping[str, Sequence[float]], mistakes: int | None
) -> dict[str, Any]:
    """Return the figures of a method at a size, from the seconds that the calls of each method have taken."""
    time_s = statistics.median(taken[name])
    bandwidth = size / time_s / 1e9
    return {
        "method": name,
        "size": size,
        "count": size // 4,
        "type": "float",
        "redop": "sum",
        "time_us": time_s * 1e6,
        "algbw": bandwidth,
        "busbw": bandwidth * 2 * (world_size - 1) / world_size,
        "wrong": mistakes,
        "ratio": time_s / statistics.median(taken[OURS]),
        "calls": len(taken[name]),
    }


def in_words(rows: Sequence[dict[str, Any]], gaps: Sequence[str], world_size: int) -> str:
    """Return the rows as a table in the columns of nccl-tests, with the method before and the ratio after them."""
    lines = [_HEADINGS, _UNITS]
    for row in rows:
        figures = (f"{row['time_us']:.2f}", f"{row['algbw']:.2f}", f"{row['busbw']:.2f}")
        wrong = "N/A" if row["wrong"] is None else str(row["wrong"])
        texts = (row["method"], str(row["size"]), str(row["count"]), row["type"], row["redop"])
        lines.append((*texts, *figures, wrong, f"{row['ratio']:.2f}"))
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADINGS))]
    table = [
        "  ".join(
            text.ljust(width) if column == 0 else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    head = [f"# all-reduce, {world_size} ranks on one node, in place; ratio: time over that of {OURS}"]
    return "\n".join([*head, *(f"# {line}" for line in table[:2]), *(f"  {line}" for line in table[2:]), *gaps])


def _methods(comm: dt.comm.Communicator, count: int) -> tuple[dict[str, Method], list[str]]:
    from mpi4py import MPI

    window, own, other = comm.allocate(count), np.zeros(count, np.float32), np.zeros(count, np.float32)

    methods: dict[str, Method] = {
        OURS: (window, comm.all_reduce),
        "disttrain, any array": (own, comm.all_reduce),
        "disttrain over MPI": (own, _as_if_on(comm.world_size, comm).all_reduce),
        "disttrain over TCP": (own, _over_tcp(comm).all_reduce),
        "MPI_Allreduce": (own, lambda array: MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, array)),
    }
    gaps = []
    if comm.world_size > 2:
        hosts = _as_if_on(2, comm)
        methods["two hosts over MPI"] = (hosts.allocate(count), hosts.all_reduce)
    else:
        gaps.append("gap: two hosts over MPI: each has one rank, and nothing to sum before")
    if importlib.util.find_spec("torch"):
        methods["torch gloo"] = _gloo(comm, own)
    else:
        gaps.append("gap: torch gloo: torch is not installed")

    def copy(array: Array) -> None:
        np.copyto(other[: array.size], array)
        comm.barrier()

    def read_and_write(array: Array) -> None:
        np.multiply(array, np.float32(1), out=array)
        comm.barrier()  # with fewer cores than ranks a pass is over when all are

    return {**methods, "memory copy": (own, copy), CEILING: (own, read_and_write)}, gaps


def _over_tcp(comm: dt.comm.Communicator) -> dt.comm.Communicator:
    """Return the same ranks over connections of this machine, without memory that they share."""
    secret = comm.broadcast_json(secrets.token_hex() if comm.rank == 0 else None)
    return tcp.join(env.place(), comm.all_gather_json, secret.encode(), "127.0.0.1")


def _as_if_on(number: int, comm: dt.comm.Communicator) -> dt.comm.Communicator:
    """Return the same ranks as if they were on so many hosts, between which messages are what there is."""
    hosts = comm.split("hosts")
    assert hosts is not None
    hosts.join_node(f"host {number * comm.rank // comm.world_size}")
    hosts.costs = costs.WITHIN_HOST  # which it is: not to be measured, nor kept for a real one
    return hosts


def _gloo(comm: dt.comm.Communicator, own: Array) -> Method:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    folder = comm.broadcast_json(tempfile.mkdtemp() if comm.rank == 0 else None)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/gloo", rank=comm.rank, world_size=comm.world_size
    )
    return own, lambda array: distributed.all_reduce(torch.from_numpy(array))


def calls_in_round(comm: dt.comm.Communicator, array: Array, call: Callable[[Array], Any]) -> int:
    """Return how many calls make up a round, the same on all ranks."""
    once = min(times(comm, array, call, 3))
    return max(1, min(_MOST_CALLS, int(_ROUND_S / once)))


def times(comm: dt.comm.Communicator, array: Array, call: Callable[[Array], Any], calls: int) -> list[float]:
    """Return the seconds of each of `calls` calls, each on the slowest rank."""
    times = np.empty(calls)
    for number in range(calls):
        array.fill(comm.rank)
        comm.barrier()
        begin = time.perf_counter()
        call(array)
        times[number] = time.perf_counter() - begin
    return [float(each) for each in comm.all_reduce(times, "max")]


def wrong(comm: dt.comm.Communicator, array: Array, call: Callable[[Array], Any]) -> int:
    """Return how many elements of a sum are wrong, on all ranks together."""
    index = np.arange(array.size) % 97
    array[:] = index + comm.rank
    call(array)
    total = comm.world_size * index + comm.world_size * (comm.world_size - 1) // 2
    return int(comm.all_reduce(np.array(np.count_nonzero(array != total))))


def main(arguments: Sequence[str]) -> None:
    """Measure the sizes in bytes that `arguments` list, after the rounds and a file for JSON, which may be empty."""
    rounds, file, *sizes = arguments
    comm = dt.init("mpi")
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[comm.rank % len(os.sched_getaffinity(0))]})
    rows, gaps = measure(comm, [int(size) for size in sizes], int(rounds))
    if comm.rank == 0:
        sys.stdout.write(in_words(rows, gaps, comm.world_size) + "\n")
        if file:
            about = {"machine": machine.describe(), "ranks": comm.world_size, "rows": rows, "gaps": gaps}
            Path(file).write_text(json.dumps(about, indent=2) + "\n")
    comm.barrier()


if __name__ == "__main__":
    main(sys.argv[1:])
