"""The transport over MPI, through mpi4py: the MPI of a wheel, or the system's own.

Where that was started to survive a rank's death, as Open MPI by ``mpiexec --with-ft ulfm``, whoever has to do with a
dead rank gets DeadRankError, and `shrink` leaves the communicator of those alive. Source: Bland et al., "Post-failure
recovery of MPI communication capability", 2013 (ULFM).
"""

import atexit
import functools
import os
import sys
import time
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

import numpy as np

from disttrain import env, progress
from disttrain.comm.base import Communicator
from disttrain.comm.ending import abort_on_exception
from disttrain.comm.pending import HostArray, Repeated, Request
from disttrain.comm.waiting import SLEEP_S, YIELD_S, Patience, left_alone, wait_until
from disttrain.errors import CommError, DeadRankError, LaunchError

if TYPE_CHECKING:
    from mpi4py import MPI

Method = TypeVar("Method", bound=Callable[..., Any])

_MESSAGE_BYTES = 1 << 30  # older MPIs count in 32 bits

_LOOK_S = 0.05  # how often a rank that waits looks whether the other one has left, or any has something to tell
_FAREWELL, _TOLD = 0, 1  # tags of what goes apart from messages
_IN_FLIGHT_S = 1.0  # what was sent before it left may still arrive


def connect() -> Communicator:
    """Join the job that MPI's launcher has started, of any number of ranks.

    With more than one rank, an exception that nothing catches ends all ranks from now on, and a rank whose script
    ends while another waits for it is an error there.

    Raises:
        LaunchError: no MPI can be loaded, or it does not know the launcher of this process.
    """
    mpi = _load()
    place = env.place()
    if place.world_size > 1 and mpi.COMM_WORLD.Get_size() == 1:
        version = " ".join(mpi.Get_library_version().partition("\n")[0].split()[:4])
        mpiexec = os.path.join(os.path.dirname(sys.executable), "mpiexec")
        raise LaunchError(
            f"{place.launcher} started {place.world_size} processes, but this one is alone in the MPI "
            f"that it loaded, {version}: launcher and MPI do not belong together. Start the job with "
            f"the mpiexec beside this python ({mpiexec}), or install the launcher's MPI for mpi4py"
        )
    comm = MpiCommunicator(mpi, mpi.COMM_WORLD.Dup(), mpi.COMM_WORLD.Dup())
    if comm.world_size > 1:
        abort_on_exception(comm)
        atexit.register(comm.leave)
        comm.join_node(env.host())
    return comm


def _heeding_losses(method: Method) -> Method:
    """Raise DeadRankError where a method meets the death of a rank; a decorator."""

    @functools.wraps(method)
    def heeding(self: "MpiCommunicator", *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except self.mpi.Exception as error:
            raise self.failure(error, self._own) from error

    return cast(Method, heeding)


class MpiCommunicator(Communicator):
    """A rank of MPI, on a communicator of its own: the program's other MPI messages stay apart.

    Args:
        mpi: mpi4py's module.
        world: MPI's communicator of these ranks.
        asides: that of the whole job's ranks, by which they say that they leave, and what else passes messages.
    """

    transport = "mpi"

    def __init__(self, mpi: ModuleType, world: "MPI.Comm", asides: "MPI.Comm") -> None:
        self.mpi, self._world, self._asides = mpi, world, asides
        self.byte, self.status = mpi.BYTE, mpi.Status()  # the status: of what was looked at last
        self._telling: list[tuple[bytes, MPI.Request]] = []  # kept until they have gone through
        self._splits: dict[int, tuple[Sequence[int], MPI.Comm]] = {}
        self._dropped: set[int] = set()  # of these, the groups that this rank has dropped
        self._given_up: list[Any] = []  # of ranks that were lost
        # an MPI that loses no rank alone calls these errors unknown
        self._losses = {mpi.ERR_PROC_FAILED, mpi.ERR_PROC_FAILED_PENDING, mpi.ERR_REVOKED} - {mpi.ERR_UNKNOWN}
        super().__init__(rank=world.Get_rank(), world_size=world.Get_size(), local_rank=0)

    def _split(self, members: Sequence[int], number: int) -> Communicator | None:
        # MPI wants all ranks of a group to free it in the same order, and garbage is not collected so.
        dropped = dict(zip(self.job_ranks, self.all_gather_json(sorted(self._dropped)), strict=True))
        for old in sorted(self._dropped):
            if all(old in dropped.get(rank, ()) for rank in self._splits[old][0]):
                self._splits.pop(old)[1].Free()
                self._dropped.remove(old)
        color, key = (members[0], members.index(self.rank)) if members else (self.mpi.UNDEFINED, 0)
        world = self._world.Split(color, key)
        if not members:
            return None
        group = MpiCommunicator(self.mpi, world, self._asides)
        group._splits, group._dropped = self._splits, self._dropped
        self._splits[number] = [self.job_ranks[rank] for rank in members], world
        weakref.finalize(group, self._dropped.add, number).atexit = False
        return group

    def _isend(self, array: HostArray, dest: int, tag: int) -> Request:
        if array.nbytes > _MESSAGE_BYTES:
            return _Parts([self._isend(part, dest, tag) for part in _parts(array)])
        try:
            request = self._world.Isend((array, self.byte), dest, tag)
        except self.mpi.Exception as error:
            raise self.failure(error, self._own) from error
        return _Message(self, request, None, self.job_ranks[dest], is_sent=True)

    def _irecv(self, array: HostArray, source: int, tag: int, *, up_to: bool = False) -> Request:
        if array.nbytes > _MESSAGE_BYTES:
            return _Parts([self._irecv(part, source, tag) for part in _parts(array)])
        try:
            request = self._world.Irecv((array, self.byte), source, tag)
        except self.mpi.Exception as error:
            raise self.failure(error, self._own) from error
        return _Message(self, request, None if up_to else array.nbytes, self.job_ranks[source], is_sent=False)

    @property
    def _own(self) -> str:
        return f"rank {self.job_ranks[self.rank]}"

    @_heeding_losses
    def _repeated(self, memory: HostArray, peer: int, tag: int, *, sends: bool) -> Repeated:
        make = self._world.Send_init if sends else self._world.Recv_init
        comm = weakref.proxy(self)  # which has this
        return _Repeated(comm, make((memory, self.byte), peer, tag), self.job_ranks[peer], is_sent=sends)

    @_heeding_losses
    def _tell(self, rank: int, data: bytes) -> None:
        self._telling = [each for each in self._telling if not each[1].Test()]
        self._telling.append((data, self._asides.Isend([data, self.mpi.BYTE], rank, _TOLD)))

    def _told(self) -> tuple[int, bytes] | None:
        status = self.status
        try:
            if not self._asides.Iprobe(self.mpi.ANY_SOURCE, _TOLD, status):
                return None
            data = bytearray(status.Get_count(self.byte))
            self._asides.Recv([data, self.byte], status.Get_source(), _TOLD)
        except self.mpi.Exception as error:
            raise self.failure(error, self._own) from error
        return status.Get_source(), bytes(data)

    def shrink(self) -> list[int]:
        """Become the communicator of those ranks that are alive; see `Communicator.shrink`."""
        # never freed: what MPI has under way may still come, into memory that these keep
        kept = self._world, self._asides, self._everywhere, self._node, self._contract, self._shorts
        self._given_up.append(kept)
        before, given_up, world = self._world.Get_group(), self._given_up, self._world
        while True:
            world.Revoke()  # so that ranks which wait for one that is alive, hear of it as well
            world = world.Shrink()
            world.Set_errhandler(self.mpi.ERRORS_RETURN)
            try:
                MpiCommunicator.__init__(self, self.mpi, world, world.Dup())
                self.join_node(env.host())
            except (self.mpi.Exception, DeadRankError):
                continue  # another one has died
            finally:
                self._given_up = given_up
            lost = self.mpi.Group.Difference(before, world.Get_group())
            return sorted(self.mpi.Group.Translate_ranks(lost, None, self.mpi.COMM_WORLD.Get_group()))

    def failure(self, error: "MPI.Exception", who: str) -> CommError:
        """Return what to raise for MPI's `error`."""
        if error.Get_error_class() in self._losses:
            return DeadRankError(f"{who}: a rank of the job has died: {error.Get_error_string()}")
        return CommError(f"{who}: {error.Get_error_string()}")

    def leave(self) -> None:
        """Tell all ranks that this one sends and receives nothing more."""
        progress.at(progress.Phase.LEFT)
        if not self.mpi.Is_finalized():
            for rank in range(self.world_size):
                if rank != self.rank:
                    self._asides.Isend([b"", self.mpi.BYTE], rank, _FAREWELL)  # goes through at once: it is empty

    @_heeding_losses
    def has_left(self, rank: int) -> bool:
        """Return whether the job's `rank` has said that it leaves."""
        return bool(self._asides.Iprobe(rank, _FAREWELL))

    @_heeding_losses
    def _serve(self, rank: int) -> bool:
        self._world.Iprobe(self.mpi.ANY_SOURCE, self.mpi.ANY_TAG)  # MPI moves messages on only when it is called
        return self.has_left(rank)

    def abort(self, exit_code: int) -> NoReturn:
        """End all ranks of the job by MPI_Abort."""
        self._asides.Abort(exit_code)


class _Awaited(ABC):
    """What is sent to a rank, or received from it.

    Args:
        comm: whose message it is.
        peer: the other rank, of the job.
        is_sent: whether it is sent.
    """

    __slots__ = ("_comm", "_is_sent", "_peer")

    def __init__(self, comm: MpiCommunicator, peer: int, *, is_sent: bool) -> None:
        self._comm, self._peer, self._is_sent = comm, peer, is_sent

    @abstractmethod
    def test(self) -> bool:
        """Return whether it has gone through; never blocks."""

    def wait(self) -> None:
        """Block until it has gone through."""
        if wait_until(self.test, YIELD_S):
            return
        begin = time.monotonic() - YIELD_S
        progress.waits_for(self._peer, to_send=self._is_sent)
        own = self._comm.job_ranks[self._comm.rank]
        patience = Patience(own, self._peer, begin)
        look_s, left_s = begin + _LOOK_S, float("inf")
        while not self.test():
            time.sleep(SLEEP_S)
            now = time.monotonic()
            if now < look_s:
                continue
            look_s = now + _LOOK_S
            patience.check(now)
            self._comm.listen()
            if self._comm.has_left(self._peer):
                left_s = min(left_s, now)
            if now - left_s > _IN_FLIGHT_S:
                raise left_alone(own, self._peer)

    @property
    def _what(self) -> str:
        own = self._comm.job_ranks[self._comm.rank]
        return f"rank {own}: message {'to' if self._is_sent else 'from'} rank {self._peer}"


class _Message(_Awaited):
    """A message.

    Args:
        comm: whose message it is.
        request: MPI's.
        expected: the size in bytes that it must have where it is received; None: any.
        peer: the other rank, of the job.
        is_sent: whether it is sent.
    """

    __slots__ = ("_expected", "_request")

    def __init__(
        self, comm: MpiCommunicator, request: "MPI.Request", expected: int | None, peer: int, *, is_sent: bool
    ) -> None:
        self._comm, self._peer, self._is_sent = comm, peer, is_sent
        self._request, self._expected = request, expected

    def test(self) -> bool:
        """Return whether it has gone through; never blocks."""
        comm = self._comm
        if self._expected is None:
            try:
                return self._request.Test()
            except comm.mpi.Exception as error:
                raise comm.failure(error, self._what) from error
        try:
            if not self._request.Test(comm.status):
                return False
        except comm.mpi.Exception as error:
            if error.Get_error_class() == comm.mpi.ERR_TRUNCATE:
                raise self._mismatch("more") from error
            raise comm.failure(error, self._what) from error
        arrived = comm.status.Get_count(comm.byte)
        if arrived != self._expected:
            raise self._mismatch(str(arrived))
        self._expected = None
        return True

    def _mismatch(self, arrived: str) -> CommError:
        return CommError(
            f"{self._what} has {arrived} bytes, expected {self._expected}; all ranks must pass arrays "
            "of the same shape and dtype"
        )


class _Parts:
    """A message that is longer than MPI can count: several, which go through in their order."""

    def __init__(self, parts: list[Request]) -> None:
        self._parts = parts

    def test(self) -> bool:
        while self._parts and self._parts[0].test():
            del self._parts[0]
        return not self._parts

    def wait(self) -> None:
        for part in self._parts:
            part.wait()


class _Repeated(_Awaited):
    """A persistent request of MPI; see `Repeated`."""

    __slots__ = ("_mpi", "_request")

    def __init__(self, comm: MpiCommunicator, request: "MPI.Prequest", peer: int, *, is_sent: bool) -> None:
        super().__init__(comm, peer, is_sent=is_sent)
        self._mpi, self._request = comm.mpi, request

    def start(self) -> None:
        """Start it; what was started before has gone through."""
        try:
            self._request.Start()
        except self._mpi.Exception as error:
            raise self._comm.failure(error, self._what) from error

    def test(self) -> bool:
        """Return whether it has gone through; never blocks."""
        try:
            return self._request.Test()
        except self._mpi.Exception as error:
            raise self._comm.failure(error, self._what) from error

    def __del__(self) -> None:
        if not self._mpi.Is_finalized() and self._request.Test():
            self._request.Free()


def _parts(array: HostArray) -> list[HostArray]:
    """Return `array` in parts whose bytes every MPI can count."""
    data = array.view(np.uint8)
    return [data[at : at + _MESSAGE_BYTES] for at in range(0, data.size, _MESSAGE_BYTES)]


def _load() -> ModuleType:
    with warnings.catch_warnings():
        # That launcher and MPI do not belong together is said in `connect`, with what mends it.
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise LaunchError(
                f"MPI cannot be loaded ({' '.join(str(error).split())}): install one from a wheel, pip "
                "install 'disttrain[mpi]', or put the system's own where this process finds it, as "
                "'module load' does on a cluster"
            ) from error
    return MPI
