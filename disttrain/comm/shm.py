"""The transport among the ranks of one node, without MPI: messages through memory that they share.

Every rank has two rings for each rank that sends to it: one for messages, and a small one for control messages.
"""

import atexit
import os
import platform
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import numpy as np

from disttrain import env
from disttrain.comm.base import Communicator
from disttrain.comm.frames import FramedCommunicator, Pipe
from disttrain.comm.pending import HostArray
from disttrain.comm.rendezvous import exchange_in
from disttrain.comm.segments import SegmentsError, share
from disttrain.errors import LaunchError
from disttrain.kernels.library import chosen, native

_LINE = 64  # bytes: what different processes write lies in different lines of the cache
# Messages of the ring algorithm are summed in pieces of 1 MiB: of that, a part that stays in the cache.
_RING_BYTES, _LEAST_RING_BYTES, _ALL_RINGS_BYTES = 1 << 18, 1 << 14, 1 << 22
_CONTROL_RING_BYTES = 1 << 12


def connect() -> Communicator:
    """Join the other ranks of this job, all of which are on this node.

    They find each other in the job's private folder, which `disttrain run` makes.

    Raises:
        LaunchError: there is no such folder, others could write to it, a rank does not come, or there is no memory.
    """
    place, folder = env.place(), env.job_dir()
    if folder is None:
        raise LaunchError(
            f"the transport shm needs the folder of a job ({env.JOB_DIR}): start it by "
            "disttrain run --launcher local -n N script.py"
        )
    exchange = exchange_in(folder, place)
    ring_bytes = max(_LEAST_RING_BYTES, min(_RING_BYTES, _ALL_RINGS_BYTES // place.world_size // _LINE * _LINE))
    try:
        segments = share(
            _LINE + place.world_size * (4 * _LINE + ring_bytes + _CONTROL_RING_BYTES), exchange, range(place.world_size)
        )
    except SegmentsError as error:
        raise LaunchError(f"{error}; --launcher mpirun needs less of it") from error
    comm = ShmCommunicator(place, [np.frombuffer(each, np.uint8) for each in segments])
    atexit.register(comm.leave)
    comm.join_node(env.host())
    return comm


class ShmCommunicator(FramedCommunicator):
    """A rank among others of its node.

    Args:
        place: of this rank.
        segments: memory of each rank: whether it has ended, its rings, and those for control messages.
    """

    transport = "shm"

    def __init__(self, place: env.Place, segments: list[HostArray]) -> None:
        fence = _fence()
        self._has_ended = [segment[:_LINE].data.cast("B") for segment in segments]
        others = [rank for rank in range(place.world_size) if rank != place.rank]
        rings, controls = zip(*(_divided(segment[_LINE:], place.world_size) for segment in segments), strict=True)

        def pipes(memory: Sequence[HostArray]) -> dict[int, Pipe]:
            return {
                peer: _Pipe(_Ring(memory[peer][place.rank], fence), _Ring(memory[place.rank][peer], fence))
                for peer in others
            }

        super().__init__(place, pipes(rings), pipes(controls))

    def leave(self) -> None:
        """Tell the others that this rank communicates no more."""
        self._has_ended[self.rank][0] = 1

    def abort(self, exit_code: int) -> NoReturn:
        """End this process; its exit code tells whoever started the job to end the others."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)

    def has_ended(self, rank: int) -> bool:
        """Return whether `rank` communicates no more."""
        return bool(self._has_ended[rank][0])

    def _serve(self, rank: int) -> bool:
        has_ended = self.has_ended(rank)
        self.move()
        return has_ended


class _Pipe:
    """Bytes to a rank through its ring, and from it through this rank's."""

    def __init__(self, to: "_Ring", from_: "_Ring") -> None:
        self._to = to
        self.read = from_.read

    def write(self, parts: Sequence[HostArray]) -> int:
        """Write as many bytes of `parts` as there is room for, and return how many."""
        total = 0
        for part in parts:
            count = self._to.write(part)
            total += count
            if count < part.size:
                break
        return total


class _Ring:
    """Bytes on their way from one process to another, which count what they have written and read.

    Args:
        memory: two lines for the counters, and room; zeroed at first.
        fence: orders what is written before it and after it.
    """

    def __init__(self, memory: HostArray, fence: Callable[[], None]) -> None:
        self._written = memory[:_LINE].data.cast("B").cast("q")
        self._read = memory[_LINE : 2 * _LINE].data.cast("B").cast("q")
        self._room = memory[2 * _LINE :]
        self._fence = fence

    def write(self, data: HostArray) -> int:
        """Write as many of the bytes `data` as there is room for, and return how many."""
        begin = self._written[0]
        count = min(data.size, self._room.size - (begin - self._read[0]))
        if count:
            self._fence()
            at = begin % self._room.size
            first = min(count, self._room.size - at)
            self._room[at : at + first] = data[:first]
            self._room[: count - first] = data[first:count]
            self._fence()
            self._written[0] = begin + count
        return count

    def read(self, data: HostArray) -> int:
        """Read as many bytes into `data` as there are, at most its size, and return how many."""
        begin = self._read[0]
        count = min(data.size, self._written[0] - begin)
        if count:
            self._fence()
            at = begin % self._room.size
            first = min(count, self._room.size - at)
            data[:first] = self._room[at : at + first]
            data[first:count] = self._room[: count - first]
            self._fence()
            self._read[0] = begin + count
        return count


def _divided(memory: HostArray, world_size: int) -> tuple[HostArray, HostArray]:
    """Return the memory of a rank's rings, and of those for control messages, shapes ``(world_size, bytes)``."""
    controls = world_size * (2 * _LINE + _CONTROL_RING_BYTES)
    return memory[:-controls].reshape(world_size, -1), memory[-controls:].reshape(world_size, -1)


def _fence() -> Callable[[], None]:
    """Return what keeps memory accesses in order."""
    fence: Callable[[], None] | None = native("fence")
    if fence is not None:
        return fence
    if platform.machine() in ("x86_64", "AMD64"):
        return lambda: None  # its processors keep the order of writes, and of reads
    raise LaunchError(f"the transport shm needs native kernels on {platform.machine()}: {chosen().reason}")
