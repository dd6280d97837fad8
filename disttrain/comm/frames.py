"""Messages over byte pipes: each is a frame, a header and its bytes, in pieces as there is room.

What a rank has not asked for yet waits in the pipe, or, where another message lies behind it, beside it.
"""

import struct
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from disttrain import env, progress
from disttrain.comm.base import Communicator
from disttrain.comm.pending import HostArray, Request
from disttrain.comm.queues import Queues
from disttrain.comm.waiting import Patience, left_alone, wait_until
from disttrain.errors import CommError

_LOOK_S = 0.25  # how often a rank that waits looks at the clock
_LAST_WORDS_S = 0.25  # a rank may have ended because another one was lost, which this one does not know yet
_HEADER = struct.Struct("<qq")  # tag, bytes
# What a header may announce: more comes of a broken pipe, and memory is not taken for it.
_MOST_BYTES, CONTROL_BYTES = 1 << 40, 1 << 12


class Pipe(Protocol):
    """Bytes on their way to another rank, and from it; neither call waits."""

    def write(self, parts: Sequence[HostArray]) -> int:
        """Write as many bytes of `parts`, one after the other, as there is room for, and return how many."""

    def read(self, into: HostArray) -> int:
        """Read as many bytes as there are, at most as many as `into` has, and return how many."""


class FramedCommunicator(Communicator):
    """A rank with byte pipes to all others.

    Args:
        place: of this rank.
        pipes: by rank, what messages go through.
        controls: by rank, what control messages go through: these pass messages that nobody has asked for.
    """

    def __init__(self, place: env.Place, pipes: Mapping[int, Pipe], controls: Mapping[int, Pipe]) -> None:
        super().__init__(rank=place.rank, world_size=place.world_size, local_rank=place.local_rank)
        self._outboxes = {rank: _Outbox(pipe) for rank, pipe in pipes.items()}
        self._inboxes = {rank: _Inbox(pipe, rank, _MOST_BYTES) for rank, pipe in pipes.items()}
        self._control_outboxes = {rank: _Outbox(pipe) for rank, pipe in controls.items()}
        self._control_inboxes = {rank: _Inbox(pipe, rank, CONTROL_BYTES) for rank, pipe in controls.items()}
        self._busy: set[_Outbox | _Inbox] = set()
        self.lost: int | None = None  # a rank that has ended without a word: the job cannot go on

    @abstractmethod
    def has_ended(self, rank: int) -> bool:
        """Return whether `rank` communicates no more; what it has sent before may still be in its pipe."""

    def await_news(self, is_done: Callable[[], bool]) -> None:
        """Return when `is_done`, or, sooner, after a while; asking that moves messages on."""
        wait_until(is_done, _LOOK_S)

    def _isend(self, array: HostArray, dest: int, tag: int) -> Request:
        message = _Sent(self, dest, tag, array)
        self._post(self._outboxes[dest], message)
        return message

    def _irecv(self, array: HostArray, source: int, tag: int, *, up_to: bool = False) -> Request:
        message = _Received(self, source, tag, array, up_to)
        self._inboxes[source].post(message)
        self._busy.add(self._inboxes[source])
        return message

    def _tell(self, rank: int, data: bytes) -> None:
        """Start to send `data`, at most 4 KiB, past all messages; never blocks."""
        if len(data) > CONTROL_BYTES:
            raise CommError(f"a control message of {len(data)} bytes: expected at most {CONTROL_BYTES}")
        self._say(rank, 0, data)

    def _told(self) -> tuple[int, bytes] | None:
        """Return the rank and the data of a control message that has come, None where there is none; never blocks."""
        for rank, inbox in self._control_inboxes.items():
            data = inbox.next()
            if data is not None:
                return rank, data
        return None

    def check(self, limit_s: float = 0.0) -> None:
        """Raise `CommError` if a rank has ended without a word, or does within `limit_s`."""
        if self.lost is not None:
            raise CommError(
                f"rank {self.lost} has ended without a word, killed or after an error of its own, and rank {self.rank} "
                f"cannot go on without it in {progress.own().what_words}"
            )

    def _say(self, rank: int, tag: int, data: bytes) -> None:
        self._post(self._control_outboxes[rank], _Sent(self, rank, tag, np.frombuffer(data, np.uint8)))

    def _post(self, outbox: "_Outbox", message: "_Sent") -> None:
        outbox.post(message)
        self._busy.add(outbox)
        self.move()

    def move(self) -> bool:
        """Move all messages on, as far as is possible without waiting; return whether anything moved."""
        moved = False
        for box in tuple(self._busy):
            moved |= box.move()
            if not box.is_busy:
                self._busy.discard(box)
        return moved


class _Message(ABC):
    """A message under way between this rank and another one."""

    def __init__(self, comm: FramedCommunicator, peer: int) -> None:
        self._comm, self._peer = comm, peer

    def test(self) -> bool:
        """Return whether the message has gone through; never blocks.

        Raises:
            CommError: the other rank has ended without it, or means one of another size.
        """
        if self.is_through():
            return True
        has_ended = self._comm.has_ended(self._peer)  # before the last look at its pipe
        self._comm.move()
        if self.is_through():
            return True
        self._comm.check()
        if has_ended:
            self._comm.check(_LAST_WORDS_S)
            raise left_alone(self._comm.rank, self._peer)
        return False

    def wait(self) -> None:
        """Block until the message has gone through."""
        if self.test():
            return
        progress.waits_for(self._peer, to_send=isinstance(self, _Sent))
        patience = Patience(self._comm.rank, self._peer, time.monotonic())
        while not self.test():
            patience.check(time.monotonic())
            # what has moved is worth looking out for the next
            self._comm.await_news(lambda: self._comm.move() or self._comm.listen() or self.test())

    @abstractmethod
    def is_through(self) -> bool:
        """Return whether the message has gone through, as far as is known."""


class _Sent(_Message):
    """A message that this rank sends: through when all of it is in the pipe."""

    def __init__(self, comm: FramedCommunicator, dest: int, tag: int, array: HostArray) -> None:
        super().__init__(comm, dest)
        self.parts = [np.frombuffer(_HEADER.pack(tag, array.nbytes), np.uint8)]
        if array.nbytes:
            self.parts.append(array.view(np.uint8))

    def is_through(self) -> bool:
        return not self.parts


class _Received(_Message):
    """A message that this rank has asked for: through when its frame is there."""

    def __init__(self, comm: FramedCommunicator, source: int, tag: int, array: HostArray, up_to: bool) -> None:
        super().__init__(comm, source)
        self.tag, self.data, self._up_to = tag, array.view(np.uint8), up_to
        self.frame: _Frame | None = None

    def fits(self, nbytes: int) -> bool:
        """Return whether a message of so many bytes may be what was asked for."""
        return nbytes == self.data.size or (self._up_to and nbytes < self.data.size)

    @property
    def is_missing(self) -> bool:
        """Whether some of it is still to come."""
        return self.frame is None or self.frame.rest.size > 0

    def is_through(self) -> bool:
        if self.is_missing:
            return False
        assert self.frame is not None
        if not self.fits(self.frame.data.size):
            raise CommError(
                f"rank {self._comm.rank}: message from rank {self._peer} has {self.frame.data.size} bytes, expected "
                f"{self.data.size}; all ranks must pass arrays of the same shape and dtype"
            )
        if not self.frame.is_in_place:
            self.data[: self.frame.data.size] = self.frame.data
            self.frame.is_in_place = True
        return True


class _Frame:
    """A message that arrives: `rest` is where the bytes go that are still to come.

    Args:
        data: where it goes.
        is_in_place: whether that is where it was asked for.
    """

    def __init__(self, data: HostArray, *, is_in_place: bool = False) -> None:
        self.data = self.rest = data
        self.is_in_place = is_in_place


class _Outbox:
    """The messages to one rank, in their order."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
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
            count = self._pipe.write(parts)
            if not count:
                break
            moved = True
            while parts and count >= parts[0].size:
                count -= parts.pop(0).size
            if parts:
                parts[0] = parts[0][count:]
            else:
                self._messages.popleft()
        return moved


class _Inbox:
    """The messages from one rank: those that have come, and those that were asked for, each by tag and in order."""

    def __init__(self, pipe: Pipe, source: int, most_bytes: int) -> None:
        self._pipe = pipe
        self._source = source
        self._most_bytes = most_bytes
        self._header = _Frame(np.empty(_HEADER.size, np.uint8))
        self._coming: _Frame | None = None  # whose header has been read
        self._arrived = Queues[int, _Frame]()
        self._asked = Queues[int, _Received]()
        self._missing: deque[_Received] = deque()

    @property
    def is_busy(self) -> bool:
        return bool(self._missing)

    def post(self, message: _Received) -> None:
        message.frame = self._arrived.take(message.tag)
        if message.frame is None:
            self._asked.put(message.tag, message)
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

    def next(self) -> bytes | None:
        """Return the next message of tag 0, None if it is not there, or not all of it; nobody has asked for any."""
        while (arrived := self._arrived.first(0)) is None or arrived.rest.size:
            if not self._read():
                return None
        self._arrived.take(0)
        data: bytes = arrived.data.tobytes()
        return data

    def has(self, tag: int) -> bool:
        """Return whether a message of `tag` has come, that nobody has asked for."""
        while self._read():
            pass
        return self._arrived.first(tag) is not None

    def _read(self) -> bool:
        """Return whether there was anything to read."""
        frame = self._coming or self._header
        count = self._pipe.read(frame.rest)
        frame.rest = frame.rest[count:]
        if frame.rest.size:
            return count > 0
        if frame is self._coming:
            self._coming = None
            return True
        tag, nbytes = _HEADER.unpack(frame.data.data)
        if not 0 <= nbytes <= self._most_bytes:
            raise CommError(
                f"a message from rank {self._source} announces {nbytes} bytes, expected at most {self._most_bytes}: "
                "what comes from it is not what it sent"
            )
        self._header.rest = self._header.data
        asked = self._asked.take(tag)
        fits = asked is not None and asked.fits(nbytes)
        data = asked.data[:nbytes] if asked is not None and fits else np.empty(nbytes, np.uint8)
        coming = _Frame(data, is_in_place=fits)
        if asked is not None:
            asked.frame = coming
        else:
            self._arrived.put(tag, coming)
        self._coming = coming if nbytes else None
        return True
