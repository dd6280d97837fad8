"""A collective is a generator of the messages it waits for, driven by whoever holds it.

No thread of its own moves messages along: a thread would take turns with backward for the
interpreter, and on a full node for the core.
"""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from disttrain import progress
from disttrain.comm.scratch import Scratch
from disttrain.comm.waiting import wait_until
from disttrain.errors import CommError, ContractError

if TYPE_CHECKING:
    from disttrain.comm.contract import Collective

_MOVING_S = 1.0  # then whoever waits does so patiently, and looks after the others less often

HostArray: TypeAlias = np.ndarray[Any, Any]


class Request(Protocol):
    """A message under way."""

    def test(self) -> bool:
        """Return whether the message has gone through; never blocks."""

    def wait(self) -> None:
        """Block until the message has gone through."""


Steps: TypeAlias = Generator[Request, None, None]


@dataclass(kw_only=True, slots=True)
class Channel:
    """What one collective sends and receives through: its messages meet those of no other.

    Attributes:
        rank: of this process.
        world_size: number of ranks.
        send: starts to send an array to a rank.
        receive: starts to receive an array from a rank.
        scratch: lends memory to receive into.
        collective: what the contract has of it; None for what nobody calls, as when ranks join.
    """

    rank: int
    world_size: int
    send: Callable[[HostArray, int], Request]
    receive: Callable[[HostArray, int], Request]
    scratch: Scratch
    collective: "Collective | None" = None

    def among(self, ranks: Sequence[int]) -> "Channel":
        """Return this channel among some of its ranks, this one among them, which are numbered as in `ranks`."""
        return replace(
            self,
            rank=ranks.index(self.rank),
            world_size=len(ranks),
            send=lambda array, place: self.send(array, ranks[place]),
            receive=lambda array, place: self.receive(array, ranks[place]),
        )


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
        for failure in filter(None, (pending._failure for pending in self._under_way)):
            raise CommError(f"a collective of this communicator has failed before: {failure}") from failure
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
