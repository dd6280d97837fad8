"""`python -m benchmarks.ray_allreduce`: sums over Ray's actors on this machine, disttrain's and ray.util.collective's.

Beside them MPI_Allreduce, which actors cannot call: its ranks are a job of their own under mpiexec, on the same cores.
The two jobs take turns, size by size and round by round, and each sleeps while the other one works. What is a round,
and the columns, are those of `disttrain bench allreduce`. It needs Ray, torch, by which Ray's collective sums on CPUs,
and an MPI:

    pip install -e '.[ray,mpi]' torch==2.13.0
    python -m benchmarks.ray_allreduce -n 2 --sizes 1,16,100
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import disttrain as dt
from benchmarks.allreduce import OURS, calls_in_round, in_words, row, times, wrong
from disttrain.ray import Request, cluster
from disttrain.ray.meeting import held_port, meeting, place
from launch.mpirun import find_mpi

RAYS = "ray.util.collective, gloo"
MPIS = "MPI_Allreduce"
_LOOK_S = 0.0005


class Summing:
    """A rank that sums arrays in some ways: an actor, or a process under mpiexec.

    Args:
        count: elements of the largest array.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._methods: dict[str, tuple[Any, Callable[[Any], Any]]] = {}

    def arrive(self) -> str:
        """Return an address at which rank 0 may listen."""
        self._port, address = held_port()
        return address

    def niceness(self) -> int:
        """Return how far this process lets others go first: Ray has its actors do so."""
        return os.nice(0)

    def join(self, environment: dict[str, str]) -> None:
        """Join the other actors, in disttrain's way and in Ray's."""
        os.environ.update(environment)
        self._comm = self._pinned(dt.init())
        self._methods[OURS] = self._comm.allocate(self._count), self._comm.all_reduce
        import torch
        from ray.util import collective

        torch.set_num_threads(1)
        collective.init_collective_group(self._comm.world_size, self._comm.rank, backend="gloo")
        own = np.zeros(self._count, np.float32)
        self._methods[RAYS] = own, lambda array: collective.allreduce(torch.from_numpy(array))

    def join_mpi(self) -> dt.comm.Communicator:
        """Join the other processes under mpiexec."""
        from mpi4py import MPI

        self._comm = self._pinned(dt.init("mpi"))
        own = np.zeros(self._count, np.float32)
        self._methods[MPIS] = own, lambda array: MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, array)
        return self._comm

    def check(self, method: str, size: int) -> tuple[int, int]:
        """Return how many elements of a sum are wrong, and how many calls make up a round."""
        array, call = self._methods[method]
        array = array[: size // 4]
        return wrong(self._comm, array, call), calls_in_round(self._comm, array, call)

    def round(self, method: str, size: int, calls: int) -> list[float]:
        """Return the seconds of each call of a round, each on the slowest rank."""
        array, call = self._methods[method]
        return times(self._comm, array[: size // 4], call, calls)

    def _pinned(self, comm: dt.comm.Communicator) -> dt.comm.Communicator:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[comm.rank % len(cores)]})
        return comm


class Actors:
    """The ranks that are Ray's actors."""

    def __init__(self, workers: int, count: int) -> None:
        import ray

        actor = ray.remote(Summing).options(num_cpus=1)
        self._ranks = [actor.remote(count) for _ in range(workers)]
        where = meeting(ray.get(self._ranks[0].arrive.remote()))
        places = [place(rank, workers, rank, workers) for rank in range(workers)]
        ray.get([rank.join.remote(where | own) for rank, own in zip(self._ranks, places, strict=True)])

    def ask(self, name: str, *args: Any) -> Any:
        """Call a method on all ranks, and return what it returned on rank 0."""
        import ray

        return ray.get([getattr(rank, name).remote(*args) for rank in self._ranks])[0]


class Processes:
    """The ranks that are processes under mpiexec, as nice as the actors; rank 0 hears by its standard input."""

    def __init__(self, workers: int, count: int, niceness: int) -> None:
        command = ["nice", "-n", str(niceness - os.nice(0))]
        command += [find_mpi().mpiexec, "-n", str(workers), sys.executable, "-m", __spec__.name, "--serve", str(count)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout

    def ask(self, name: str, *args: Any) -> Any:
        """Call a method on all ranks, and return what it returned on rank 0."""
        print(json.dumps([name, *args]), file=self._to, flush=True)
        return json.loads(self._from.readline())

    def close(self) -> None:
        """Have them end."""
        self._to.close()
        self._process.wait(60)
        self._from.close()


def serve(count: int) -> None:
    """Do what rank 0 reads, on all ranks of an MPI job; they sleep until it has read something."""
    from mpi4py import MPI

    rank = Summing(count)
    comm = rank.join_mpi()
    while True:
        line = np.zeros(1 << 8, np.uint8)
        if comm.rank == 0:
            data = sys.stdin.readline().encode()
            line[: len(data)] = np.frombuffer(data, np.uint8)
        request = MPI.COMM_WORLD.Ibcast(line)
        while not request.Test():  # waiting in MPI would take a core from the actors
            time.sleep(_LOOK_S)
        if not line[0]:
            return
        name, *args = json.loads(line.tobytes().rstrip(b"\0"))
        answer = getattr(rank, name)(*args)
        if comm.rank == 0:
            print(json.dumps(answer), flush=True)


def measure(workers: int, sizes: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Return a row for each size and method."""
    count = max(sizes) // 4
    with tempfile.TemporaryDirectory(prefix="disttrain-") as folder, cluster(Request(workers=workers), Path(folder)):
        actors = Actors(workers, count)
        processes = Processes(workers, count, actors.ask("niceness"))
        groups: dict[str, Actors | Processes] = {OURS: actors, RAYS: actors, MPIS: processes}
        rows = []
        for size in sizes:
            checked = {name: group.ask("check", name, size) for name, group in groups.items()}
            taken: dict[str, list[float]] = {name: [] for name in groups}
            for _ in range(rounds):
                for name, group in groups.items():
                    taken[name] += group.ask("round", name, size, checked[name][1])
            rows += [row(name, size, workers, taken, checked[name][0]) for name in groups]
        processes.close()
    return rows


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", "--workers", type=int, default=2)
    parser.add_argument("--sizes", default="1,4,16,100", help="of arrays, in MiB")
    parser.add_argument("--rounds", type=int, default=10, help="in which all take turns")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
        return
    rows = measure(args.workers, [int(size) << 20 for size in args.sizes.split(",")], args.rounds)
    print(in_words(rows, [], args.workers))


if __name__ == "__main__":
    main()
