"""The transport among the ranks of one node, without MPI: messages through memory that they share.

Every rank has a ring for each rank that sends to it. A message is a header and its bytes, in pieces as there is room;
what a rank has not asked for yet waits in the ring, or, where another message lies behind it, beside it.
"""

import atexit
import itertools
import json
import os
import platform
import stat
import sys
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from disttrain import env
from disttrain.comm import node
from disttrain.comm.base import Communicator
from disttrain.comm.pending import HostArray, Request
from disttrain.comm.segments import Exchange, SegmentsError, share
from disttrain.comm.waiting import wait_until
from disttrain.errors import CommError, LaunchError
from disttrain.kernels.library import chosen, native

_JOIN_S = 300.0  # until all ranks have imported what their script does first
_LINE = 64  # bytes: what different processes write lies in different lines of the cache
_HEADER = np.dtype([("tag", np.int64), ("nbytes", np.int64)])
# Messages of the ring algorithm are summed in pieces of 1 MiB: of that, a part that stays in the cache.
_RING_BYTES, _LEAST_RING_BYTES, _ALL_RINGS_BYTES = 1 << 18, 1 << 14, 1 << 22

_exchanges = itertools.count()  # of this process; the same on all ranks


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
    found = folder.stat()
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022:
        raise LaunchError(f"others can write to the job's folder {folder}: it must belong to this user, with mode 0700")
    exchange = _through(folder, place.rank, place.world_size)
    ring_bytes = max(_LEAST_RING_BYTES, min(_RING_BYTES, _ALL_RINGS_BYTES // place.world_size // _LINE * _LINE))
    try:
        segments = share(_LINE + place.world_size * (2 * _LINE + ring_bytes), exchange)
    except SegmentsError as error:
        raise LaunchError(f"{error}; --launcher mpirun needs less of it") from error
    comm = ShmCommunicator(place, [np.frombuffer(each, np.uint8) for each in segments])
    atexit.register(comm.leave)
    comm.join_node()
    return comm


class ShmCommunicator(Communicator):
    """A rank among others of its node.

    Args:
        place: of this rank.
        segments: memory of each rank: whether it has ended, and its rings.
    """

    transport = "shm"

    def __init__(self, place: env.Place, segments: list[HostArray]) -> None:
        super().__init__(rank=place.rank, world_size=place.world_size, local_rank=place.local_rank)
        self._has_ended = [segment[:_LINE].data.cast("B") for segment in segments]
        fence = _fence()
        rings = [segment[_LINE:].reshape(self.world_size, -1) for segment in segments]
        self._outboxes = [_Outbox(_Ring(rings[dest][self.rank], fence)) for dest in range(self.world_size)]
        self._inboxes = [_Inbox(_Ring(rings[self.rank][source], fence)) for source in range(self.world_size)]
        self._busy: set[_Outbox | _Inbox] = set()

    def join_node(self) -> None:
        """Share memory for sums with the other ranks; every rank calls this."""
        if self.world_size > 1:
            self._node = node.join(self.rank, self.all_gather_json, self._serve)

    def leave(self) -> None:
        """Tell the others that this rank communicates no more."""
        self._has_ended[self.rank][0] = 1

    def abort(self, exit_code: int) -> NoReturn:
        """End this process; its exit code tells whoever started the job to end the others."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)

    def _isend(self, array: HostArray, dest: int, tag: int) -> Request:
        message = _Sent(self, dest, tag, array)
        self._outboxes[dest].post(message)
        self._busy.add(self._outboxes[dest])
        self.move()
        return message

    def _irecv(self, array: HostArray, source: int, tag: int) -> Request:
        message = _Received(self, source, tag, array)
        self._inboxes[source].post(message)
        self._busy.add(self._inboxes[source])
        return message

    def move(self) -> bool:
        """Move all messages on, as far as is possible without waiting; return whether anything moved."""
        moved = False
        for box in tuple(self._busy):
            moved |= box.move()
            if not box.is_busy:
                self._busy.discard(box)
        return moved

    def has_ended(self, rank: int) -> bool:
        """Return whether `rank` communicates no more."""
        return bool(self._has_ended[rank][0])

    def _serve(self, rank: int) -> bool:
        has_ended = self.has_ended(rank)
        self.move()
        return has_ended


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


class _Message(ABC):
    """A message under way between this rank and another one."""

    def __init__(self, comm: ShmCommunicator, peer: int) -> None:
        self._comm, self._peer = comm, peer

    def test(self) -> bool:
        """Return whether the message has gone through; never blocks.

        Raises:
            CommError: the other rank has ended without it, or means one of another size.
        """
        if self.is_through():
            return True
        has_ended = self._comm.has_ended(self._peer)  # before the last look at its ring
        self._comm.move()
        if self.is_through():
            return True
        if has_ended:
            raise CommError(
                f"rank {self._comm.rank}: rank {self._peer} has ended, with a message to or from it still under way; "
                "every rank must communicate alike"
            )
        return False

    def wait(self) -> None:
        """Block until the message has gone through."""
        while not self.test():
            wait_until(lambda: self._comm.move() or self.test())  # what has moved is worth looking out for the next

    @abstractmethod
    def is_through(self) -> bool:
        """Return whether the message has gone through, as far as is known."""


class _Sent(_Message):
    """A message that this rank sends: through when all of it is in the ring."""

    def __init__(self, comm: ShmCommunicator, dest: int, tag: int, array: HostArray) -> None:
        super().__init__(comm, dest)
        header = np.array([(tag, array.nbytes)], _HEADER)
        self.parts = deque([header.view(np.uint8), array.view(np.uint8)])

    def is_through(self) -> bool:
        return not self.parts


class _Received(_Message):
    """A message that this rank has asked for: through when its frame is there."""

    def __init__(self, comm: ShmCommunicator, source: int, tag: int, array: HostArray) -> None:
        super().__init__(comm, source)
        self.tag, self.data = tag, array.view(np.uint8)
        self.frame: _Frame | None = None

    @property
    def is_missing(self) -> bool:
        """Whether some of it is still to come."""
        return self.frame is None or self.frame.rest.size > 0

    def is_through(self) -> bool:
        if self.is_missing:
            return False
        assert self.frame is not None
        if self.frame.data.size != self.data.size:
            raise CommError(
                f"rank {self._comm.rank}: message from rank {self._peer} has {self.frame.data.size} bytes, expected "
                f"{self.data.size}; all ranks must pass arrays of the same shape and dtype"
            )
        if self.frame.data is not self.data:
            self.data[...] = self.frame.data
            self.frame.data = self.data
        return True


class _Frame:
    """A message that arrives: `rest` is where the bytes go that are still to come."""

    def __init__(self, data: HostArray) -> None:
        self.data = self.rest = data


class _Outbox:
    """The messages to one rank, in their order."""

    def __init__(self, ring: _Ring) -> None:
        self._ring = ring
        self._messages: deque[_Sent] = deque()

    @property
    def is_busy(self) -> bool:
        return bool(self._messages)

    def post(self, message: _Sent) -> None:
        self._messages.append(message)

    def move(self) -> bool:
        """Write as much as there is room for; return whether there was any."""
        moved = False
        while self._messages:
            parts = self._messages[0].parts
            while parts:
                count = self._ring.write(parts[0])
                moved |= count > 0
                parts[0] = parts[0][count:]
                if parts[0].size:
                    return moved
                parts.popleft()
            self._messages.popleft()
        return moved


class _Inbox:
    """The messages from one rank: those that have come, and those that were asked for, each by tag and in order."""

    def __init__(self, ring: _Ring) -> None:
        self._ring = ring
        self._header = _Frame(np.empty(_HEADER.itemsize, np.uint8))
        self._coming: _Frame | None = None  # whose header has been read
        self._arrived: defaultdict[int, deque[_Frame]] = defaultdict(deque)
        self._asked: defaultdict[int, deque[_Received]] = defaultdict(deque)
        self._missing: deque[_Received] = deque()

    @property
    def is_busy(self) -> bool:
        return bool(self._missing)

    def post(self, message: _Received) -> None:
        if self._arrived[message.tag]:
            message.frame = self._arrived[message.tag].popleft()
        else:
            self._asked[message.tag].append(message)
        self._missing.append(message)

    def move(self) -> bool:
        """Read what was asked for, as far as it is there, and put aside what lies before it; return whether any was."""
        moved = False
        while self._missing:
            if not self._missing[0].is_missing:
                self._missing.popleft()
            elif self._read():
                moved = True
            else:
                break
        return moved

    def _read(self) -> bool:
        """Return whether there was anything to read."""
        frame = self._coming or self._header
        count = self._ring.read(frame.rest)
        frame.rest = frame.rest[count:]
        if frame.rest.size:
            return count > 0
        if frame is self._coming:
            self._coming = None
            return True
        tag, nbytes = frame.data.view(_HEADER)[0].item()
        self._header.rest = self._header.data
        asked = self._asked[tag].popleft() if self._asked[tag] else None
        fits = asked is not None and asked.data.size == nbytes
        coming = _Frame(asked.data if asked is not None and fits else np.empty(nbytes, np.uint8))
        if asked is not None:
            asked.frame = coming
        else:
            self._arrived[tag].append(coming)
        self._coming = coming if nbytes else None
        return True


def _through(folder: Path, rank: int, world_size: int) -> Exchange:
    """Return what exchanges values through files in `folder`."""

    def exchange(value: Any) -> list[Any]:
        number = next(_exchanges)
        own = folder / f"shm.{number}.{rank}"
        written = own.with_suffix(f".{rank}.tmp")
        written.write_text(json.dumps(value))
        written.rename(own)
        files = [folder / f"shm.{number}.{other}" for other in range(world_size)]
        for other, file in enumerate(files):
            if not wait_until(file.exists, _JOIN_S):
                raise LaunchError(
                    f"rank {other} of {world_size} has not come within {_JOIN_S:.0f} s: {file} is missing"
                )
        return [json.loads(file.read_text()) for file in files]

    return exchange


def _fence() -> Callable[[], None]:
    """Return what keeps memory accesses in order."""
    fence: Callable[[], None] | None = native("fence")
    if fence is not None:
        return fence
    if platform.machine() in ("x86_64", "AMD64"):
        return lambda: None  # its processors keep the order of writes, and of reads
    raise LaunchError(f"the transport shm needs native kernels on {platform.machine()}: {chosen().reason}")
