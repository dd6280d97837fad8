"""Heads: each says what a rank has called, goes ahead of its first data to another one, and carries what is short.

They pass through memory of their own, which a transport may prepare once for all: messages that are sent, or received,
again and again.
"""

import math
import os
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np

from disttrain import progress
from disttrain.comm.pending import ROOM, HostArray, Repeated, Request
from disttrain.comm.waiting import SPINS

if TYPE_CHECKING:
    from disttrain.comm.base import Communicator

HEAD_BYTES = 16  # of a head alone: number and length in one word, and the mark of a call
_LENGTH_BITS = 21
_LOOKS = 100  # for a head that is to come at once: about 100 us


class PlainRepeated:
    """A message that is made anew each time; see `Communicator._repeated`."""

    def __init__(self, comm: "Communicator", memory: HostArray, peer: int, tag: int, *, sends: bool) -> None:
        self._comm, self._memory, self._peer, self._tag, self._sends = comm, memory, peer, tag, sends
        self._request: Request | None = None

    def start(self) -> None:
        """Start it; what was started before has gone through."""
        if self._sends:
            before = progress.sends()
            self._request = self._comm._isend(self._memory, self._peer, self._tag)
            progress.has_sent(before)
        else:
            self._request = self._comm._irecv(self._memory, self._peer, self._tag, up_to=True)

    def test(self) -> bool:
        """Return whether it has gone through; never blocks."""
        if self._request is not None and self._request.test():
            self._request = None
        return self._request is None

    def wait(self) -> None:
        """Block until it has gone through."""
        if self._request is not None:
            self._request.wait()


class Letter:
    """Memory of a head, and of what it carries.

    Args:
        nbytes: of what it carries, at most.
    """

    def __init__(self, nbytes: int) -> None:
        self.memory = np.empty(HEAD_BYTES + nbytes, np.uint8)
        self.words = self.memory[:HEAD_BYTES].view(np.int64).data
        self.carried = self.memory[HEAD_BYTES:]

    def as_array(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> HostArray:
        """Return what it carries, or the first of that, as an array."""
        return self.carried[: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


class Heads:
    """The heads that pass between this rank and another one.

    Args:
        comm: the communicator.
        peer: the other rank.
        tag: of heads.
    """

    def __init__(self, comm: "Communicator", peer: int, tag: int) -> None:
        self._comm, self._peer, self._tag = comm, peer, tag
        self.newest = Letter(ROOM)  # that has come from there
        self._receive = comm._repeated(self.newest.memory, peer, tag, sends=False)
        self._is_asked = False
        self._free: list[Letter] = []
        self._sent: deque[tuple[Letter, Request]] = deque()  # may not have gone through

    def send(self, number: int, mark: int, data: HostArray | None = None) -> Request:
        """Start to send the head of a call; it is done when it has gone through.

        Args:
            number: of the call.
            mark: of what was called.
            data: what the head carries, C-contiguous, shape ``(n,)``, at most `ROOM` bytes: a copy is sent.
        """
        while self._sent and self._sent[0][1].test():
            self._free.append(self._sent.popleft()[0])
        letter = self._free.pop() if self._free else Letter(ROOM)
        nbytes = 0 if data is None else data.nbytes
        letter.words[0], letter.words[1] = first_word(number, nbytes), mark
        if data is not None:
            letter.carried[:nbytes] = data.view(np.uint8)
        request = self._comm._isend(letter.memory[: HEAD_BYTES + nbytes], self._peer, self._tag)
        self._sent.append((letter, request))
        return request

    def prepare(self, letter: Letter) -> Repeated:
        """Return what sends `letter` again and again."""
        return self._comm._repeated(letter.memory, self._peer, self._tag, sends=True)

    def ask(self) -> None:
        """Start to receive the next head."""
        if not self._is_asked:
            self._receive.start()
            self._is_asked = True

    def brings(self, word: int, mark: int) -> bool:
        """Return whether the next head comes at once, and is the one that is expected; it is in `newest` then.

        Args:
            word: its `first_word`.
            mark: of the call.
        """
        is_here, words = self._receive.test, self.newest.words
        for look in range(_LOOKS):
            if is_here():
                self._is_asked = words[0] != word or words[1] != mark
                return not self._is_asked
            if look >= SPINS:
                os.sched_yield()
        return False

    def next(self) -> tuple[int, int, HostArray] | None:
        """Return number, mark and data of the next head, None where it is not there; never blocks.

        The data must be used before anything else is asked for.
        """
        self.ask()
        if not self._receive.test():
            return None
        self._is_asked = False
        word, mark = self.newest.words
        return word >> _LENGTH_BITS, mark, self.newest.carried[: word & (1 << _LENGTH_BITS) - 1]

    def wait(self) -> None:
        """Block until what was asked for is there."""
        self._receive.wait()


def first_word(number: int, nbytes: int) -> int:
    """Return the first word of the head of call `number` that carries so many bytes; the mark is the second."""
    return number << _LENGTH_BITS | nbytes
