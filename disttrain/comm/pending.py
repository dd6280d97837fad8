"""A collective is a generator of the messages it waits for, driven by whoever holds it.

No thread of its own moves messages along: a thread would take turns with backward for the
interpreter, and on a full node for the core.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeAlias

import numpy as np

from disttrain import progress
from disttrain.comm.waiting import YIELD_S, wait_until
from disttrain.errors import CommError, ContractError, DeadRankError

if TYPE_CHECKING:
    from disttrain.comm.base import Communicator
    from disttrain.comm.contract import Call

SPEAK_S = 0.2  # that a rank waits before it says in what: longer than ranks usually wait for each other
# Bytes that a head carries at most: what a rank has called, which goes ahead of its first message. To carry a message
# costs a copy on each side, which is worth while for short ones, or where there would be one in any case.
ROOM, RIDES = 1 << 20, 1 << 14
_MOVING_S = 1.0  # then whoever waits does so patiently, and looks after the others less often

HostArray: TypeAlias = np.ndarray[Any, Any]


class Request(Protocol):
    """A message under way."""

    def test(self) -> bool:
        """Return whether the message has gone through; never blocks."""

    def wait(self) -> None:
        """Block until the message has gone through."""


class Repeated(Request, Protocol):
    """A message that is started again and again, from or to the same memory; a `Request` of what was started last."""

    def start(self) -> None:
        """Start it; what was started before has gone through."""


Steps: TypeAlias = Iterator[Request]


class Channel:
    """What one collective sends and receives through: its messages meet those of no other, and go by the contract.

    Args:
        comm: whose collective it is.
        tag: of its messages.
        call: what the contract has of it; None for what nobody calls, as when ranks join: nothing is compared.

    Attributes:
        rank: of this process.
        world_size: number of ranks.
        scratch: lends memory to receive into.
        quietly: as of the communicator.
    """

    def __init__(self, comm: "Communicator", tag: int, call: "Call | None") -> None:
        self.rank, self.world_size = comm.rank, comm.world_size
        self.scratch, self.quietly = comm.scratch, comm.quietly
        self.call = call
        self._comm, self._tag = comm, tag
        self._ranks: Sequence[int] | None = None  # of this channel, as the communicator numbers them; None: all
        self._sent_to: set[int] = set()
        self._received_from: set[int] = set()
        self._said_to: set[int] = set()
        self._waits_since_s: float | None = None

    def among(self, ranks: Sequence[int]) -> "Channel":
        """Return this channel among some of its ranks, this one among them, which are numbered as in `ranks`."""
        if list(ranks) == list(range(self.world_size)):
            return self
        part = Channel(self._comm, self._tag, self.call)
        part.rank, part.world_size, part._ranks = ranks.index(self.rank), len(ranks), ranks
        part._sent_to, part._received_from, part._said_to = self._sent_to, self._received_from, self._said_to
        return part

    @property
    def is_within_host(self) -> bool:
        """Whether its ranks are known to be on one host."""
        hosts = self._comm.hosts
        return bool(hosts) and len(set(hosts if self._ranks is None else (hosts[rank] for rank in self._ranks))) == 1

    def send(self, array: HostArray, dest: int, *, rides: int = RIDES) -> Request:
        """Start to send `array` to rank `dest`; if it is the first, behind what this rank has called.

        Args:
            array: C-contiguous, shape ``(n,)``.
            dest: the rank.
            rides: up to so many bytes it is in one message with that; at most `ROOM`, the same for who receives.
        """
        dest = dest if self._ranks is None else self._ranks[dest]
        comm = self._comm
        comm.bytes_sent += array.nbytes
        before = progress.sends()
        if self.call is not None and dest not in self._sent_to:
            self._sent_to.add(dest)
            if array.nbytes <= rides:
                message = comm._contract.send_head(self.call, dest, array)
                progress.has_sent(before)
                return message
            comm._contract.send_head(self.call, dest)
        message = comm._isend(array, dest, self._tag)
        progress.has_sent(before)
        return message

    def receive(self, array: HostArray, source: int, *, rides: int = RIDES) -> Request:
        """Start to receive `array` from rank `source`; if it is the first, behind what that has called; see `send`."""
        source = source if self._ranks is None else self._ranks[source]
        if self.call is None or source in self._received_from:
            return self._comm._irecv(array, source, self._tag)
        self._received_from.add(source)
        if array.nbytes <= rides:
            return _First(self, source, array, None)
        return _First(self, source, None, self._comm._irecv(array, source, self._tag))

    def waits_for(self, peer: int) -> None:
        """Hear, and after a while say, what is called; to be called now and then by a rank that waits.

        Args:
            peer: the rank that is waited for, as the job numbers it.

        Raises:
            ContractError: ranks differ.
        """
        self._comm.listen()
        now_s = time.monotonic()
        if self._waits_since_s is None:
            self._waits_since_s = now_s
        elif now_s - self._waits_since_s >= SPEAK_S:
            self._say(peer)

    def differs(self, announced: "Iterable[tuple[int, Call]]") -> NoReturn:
        """Raise on all ranks that ranks have announced different things, which the node's memory shows."""
        assert self.call is not None
        contract = self._comm._contract
        contract.differ([(contract.rank, self.call), *announced])

    def is_head_here(self, source: int, into: HostArray | None) -> bool:
        """Return whether rank `source` of the communicator has said what it calls, which was the same.

        Args:
            source: the rank.
            into: gets what comes with that; None: nothing does.
        """
        assert self.call is not None
        return self._comm._contract.has_come(source, self.call.sequence, into)

    def wait_for_head(self, source: int, into: HostArray | None) -> None:
        """Block until `is_head_here`; after a while say what this rank waits in."""
        if wait_until(lambda: self.is_head_here(source, into), YIELD_S):
            return
        if wait_until(lambda: self.is_head_here(source, into) or self._comm.listen(), SPEAK_S):
            return
        self._say(self._comm.job_ranks[source])
        while not self.is_head_here(source, into):
            self._comm._contract.wait_for_head(source)

    def _say(self, peer: int) -> None:
        """Say to `peer`, as the job numbers it, what this rank waits in, once."""
        if self.call is not None and peer not in self._said_to:
            self._said_to.add(peer)
            self._comm._contract.say(self.call, peer)


class _First:
    """The first message from a rank in a collective: done when it is there, and the rank has called the same.

    Args:
        channel: of the collective.
        source: the rank, as the communicator numbers it.
        into: where it goes, if it comes with the head.
        message: else: the message behind that.
    """

    __slots__ = ("_channel", "_into", "_is_checked", "_message", "_source")

    def __init__(self, channel: Channel, source: int, into: HostArray | None, message: Request | None) -> None:
        self._channel, self._source, self._into, self._message = channel, source, into, message
        self._is_checked = False

    def test(self) -> bool:
        self._is_checked = self._is_checked or self._channel.is_head_here(self._source, self._into)
        return self._is_checked and (self._message is None or self._message.test())

    def wait(self) -> None:
        if not self._is_checked:
            self._channel.wait_for_head(self._source, self._into)
            self._is_checked = True
        if self._message is not None:
            self._message.wait()


class Pending:
    """A collective under way, made by `Communicator.start_all_reduce`.

    All ranks start their collectives in the same order, and waiting finishes them in that order, so
    that ranks that wait for different ones do not wait for each other.

    Args:
        steps: yields each message that must have gone through before it can go on.
        under_way: the unfinished collectives of a communicator, in the order of their start.
        call: what it is, for the record of who waits for what.
        everywhere: the unfinished collectives of this rank, in all groups that it is in.
        note: added to an error; may be empty.
        listen: raises what other ranks have found, else moves on what is under way everywhere and returns False.
    """

    def __init__(
        self,
        steps: Steps,
        under_way: "deque[Pending]",
        call: progress.Call,
        everywhere: "deque[Pending] | None" = None,
        note: str = "",
        listen: Callable[[], bool] = lambda: False,
    ) -> None:
        self._steps = steps
        self._under_way = under_way
        self._call = call
        self._everywhere = deque[Pending]() if everywhere is None else everywhere
        self._note = note
        self._listen = listen
        self._request: Request | None = None
        self._is_done = False
        self._is_driven = False  # at this moment
        self._failure: BaseException | None = None
        under_way.append(self)
        self._everywhere.append(self)

    def advance(self) -> bool:
        """Move on as far as is possible without blocking; return whether all is done.

        Raises:
            CommError: a message failed, now or in an earlier call.
        """
        return self._is_done or (not self._is_driven and self._drive(block=False))

    def wait(self) -> None:
        """Block until this collective, and all that were started before it, are done.

        Raises:
            CommError: a message of one of them failed, now or in an earlier call.
        """
        if self._is_done:
            return
        try:
            while not self._is_done:
                first = self._under_way[0]
                progress.waits(first._call)
                first._drive(block=True)
        finally:
            progress.goes_on()

    def _drive(self, *, block: bool) -> bool:
        for pending in self._under_way:
            if (failure := pending._failure) is not None:
                kind = DeadRankError if isinstance(failure, DeadRankError) else CommError
                raise kind(f"a collective of this communicator has failed before: {failure}") from failure
        self._is_driven = True
        try:
            while True:
                if self._request is None:
                    self._request = next(self._steps)
                if block:
                    if len(self._everywhere) > len(self._under_way):  # groups: a rank that this one waits for may wait
                        wait_until(lambda: self._is_through() or self._listen(), _MOVING_S)
                    self._request.wait()
                elif not self._request.test():
                    return False
                self._request = None
        except StopIteration:
            self._is_done = True
            self._under_way.remove(self)
            self._everywhere.remove(self)
            return True
        except BaseException as failure:
            # It stays in line: what is started after a half-done sum must not pass for correct.
            self._failure = failure
            # A difference may be one in another group, and says so.
            if self._note and not isinstance(failure, ContractError):
                failure.add_note(self._note)
            raise
        finally:
            self._is_driven = False

    def _is_through(self) -> bool:
        return self._request is not None and self._request.test()


DONE = Pending(iter(()), deque(), progress.call(0, "all_reduce", "f", 4, 0))
DONE.wait()
