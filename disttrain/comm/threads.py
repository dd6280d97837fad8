"""Ranks as threads of one process, for tests and for debugging: no launcher, one traceback."""

import threading
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias

import numpy as np

from disttrain.comm import use
from disttrain.comm.base import Communicator
from disttrain.comm.pending import HostArray, Request
from disttrain.comm.queues import Queues
from disttrain.errors import CommError

_Route: TypeAlias = tuple[int, int, int]  # source, dest, tag


def run(world_size: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
    """Return what ``function(comm, *args, **kwargs)`` returns on each of `world_size` ranks.

    In its thread, each rank's communicator is also the one that `comm.current` returns.

    Raises:
        BaseException: what the first rank that failed has raised, with a note that names the rank.
    """
    world = _World()
    results: list[Any] = [None] * world_size
    ranks = [
        ThreadCommunicator(rank=rank, world_size=world_size, local_rank=rank, world=world) for rank in range(world_size)
    ]

    def work(comm: ThreadCommunicator) -> None:
        try:
            with use(comm):
                results[comm.rank] = function(comm, *args, **kwargs)
        except BaseException as error:
            world.fail(f"rank {comm.rank} failed", error)
        else:
            world.leave(comm.rank)

    threads = [threading.Thread(target=work, args=(comm,), name=f"rank {comm.rank}") for comm in ranks]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException as error:  # Ctrl-C comes to the caller's thread alone
        world.fail("the caller was interrupted", error)
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        raise
    if world.failure is not None:
        world.failure.add_note(f"{world.failed} first, of {world_size} ranks in threads")
        raise world.failure
    return results


class ThreadCommunicator(Communicator):
    """A rank that is a thread of this process; made by `run`."""

    transport = "threads"

    def __init__(self, *, rank: int, world_size: int, local_rank: int, world: "_World") -> None:
        super().__init__(rank=rank, world_size=world_size, local_rank=local_rank)
        self._world = world

    def _isend(self, array: HostArray, dest: int, tag: int) -> Request:
        self._world.post((self.rank, dest, tag), array.copy())
        return _Sent()

    def _irecv(self, array: HostArray, source: int, tag: int, *, up_to: bool = False) -> Request:
        return _Receive(self, (source, self.rank, tag), array, up_to)

    def _tell(self, rank: int, data: bytes) -> None:
        with self._world.changed:
            self._world.told[rank].append((self.rank, data))
            self._world.changed.notify_all()

    def _told(self) -> tuple[int, bytes] | None:
        told = self._world.told[self.rank]
        return told.popleft() if told else None

    def _serve(self, rank: int) -> bool:
        return rank in self._world.returned or self._world.failure is not None

    def abort(self, exit_code: int) -> NoReturn:
        """End all ranks: `run` raises SystemExit in the thread that called it."""
        raise SystemExit(exit_code)


class _World:
    """What the ranks share: messages on their way, and who has ended."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.messages = Queues[_Route, HostArray]()
        self.receives = Queues[_Route, _Receive]()
        self.told: defaultdict[int, deque[tuple[int, bytes]]] = defaultdict(deque)
        self.returned: set[int] = set()
        self.failed = ""
        self.failure: BaseException | None = None

    def post(self, route: _Route, message: HostArray) -> None:
        with self.changed:
            receive = self.receives.take(route)
            if receive is None:
                self.messages.put(route, message)
            else:
                receive.message = message
            self.changed.notify_all()

    def ask(self, route: _Route, receive: "_Receive") -> None:
        with self.changed:
            receive.message = self.messages.take(route)
            if receive.message is None:
                self.receives.put(route, receive)

    def fail(self, who: str, failure: BaseException) -> None:
        with self.changed:
            if self.failure is None:
                self.failed, self.failure = who, failure
            self.changed.notify_all()

    def leave(self, rank: int) -> None:
        with self.changed:
            self.returned.add(rank)
            self.changed.notify_all()


class _Sent:
    """A message that was copied, and is done with."""

    def test(self) -> bool:
        return True

    def wait(self) -> None:
        return


class _Receive:
    """The n-th receive of a route takes the n-th message, whichever is waited for first."""

    def __init__(self, comm: ThreadCommunicator, route: _Route, array: HostArray, up_to: bool) -> None:
        self._comm, self._world, self._route, self._array, self._up_to = comm, comm._world, route, array, up_to
        self._is_done = False
        self.message: HostArray | None = None
        self._world.ask(route, self)

    def test(self) -> bool:
        with self._world.changed:
            self._is_done = self._is_done or self._take()
        return self._is_done

    def wait(self) -> None:
        while not self._is_done:
            with self._world.changed:
                while not self._is_done and not self._world.told[self._comm.rank]:
                    self._is_done = self._take()
                    if not self._is_done:
                        self._world.changed.wait()
            self._comm.listen()  # without the lock: others need it to answer

    def _take(self) -> bool:
        """Return whether the message was there; the lock is held."""
        source, dest, _ = self._route
        message = self.message
        if message is None:
            waits = f"rank {dest} waits for a message from rank {source}"
            if self._world.failure is not None:
                raise CommError(f"{waits}, but {self._world.failed}") from self._world.failure
            if source in self._world.returned:
                raise CommError(f"{waits}, which has returned: every rank must communicate alike")
            return False
        if message.nbytes > self._array.nbytes or (message.nbytes < self._array.nbytes and not self._up_to):
            raise CommError(
                f"rank {dest}: received {message.nbytes} bytes from rank {source}, "
                f"expected {self._array.nbytes}; "
                "all ranks must pass arrays of the same shape and dtype"
            )
        self._array.view(np.uint8)[: message.nbytes] = message.view(np.uint8)
        self.message = None
        return True
