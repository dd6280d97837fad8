"""The transport over TCP, without MPI: two connections between any two ranks, for messages and control messages.

Over the latter the systems of two hosts ask each other every two seconds whether the other is still there. That of a
rank which computes, or is stopped, answers; that of a host which is off, or out of reach, does not. What is lost is
sent again, at growing intervals: a network that is back within 5 s goes unnoticed.
"""

import atexit
import contextlib
import errno
import hashlib
import os
import secrets
import select
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NoReturn
from weakref import WeakSet

import numpy as np

from disttrain import env, progress
from disttrain.comm import rendezvous
from disttrain.comm.base import Communicator
from disttrain.comm.ending import abort_on_exception
from disttrain.comm.frames import FramedCommunicator
from disttrain.comm.pending import HostArray
from disttrain.comm.rendezvous import Claim, Listener, Pass, dial
from disttrain.comm.segments import Exchange
from disttrain.errors import CommError, LaunchError

_MESSAGES, _CONTROLS = range(2)  # channels
_SPIN_S = 50e-6  # what comes so soon is seen without sleep
_LOOK_S = 0.25  # at the latest
_SUPERVISED_S = 0.25  # the supervisor has then seen by itself which rank was the first to go
_READ_BYTES = 1 << 16  # headers and short messages come many at a time
_SILENCE_S, _ASK_S = 10.0, 2  # of another host's system
_FAREWELL = 1  # tag of a control message
_OF_A_PROCESS = (0, errno.EPIPE, errno.ECONNRESET)  # how a connection ends with it; the last only if it was killed
_OUT_OF_REACH = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)
_HANGS_UP = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR

_open: "WeakSet[TcpCommunicator]" = WeakSet()


def connect() -> Communicator:
    """Join the other ranks of this job: at ``DISTTRAIN_RENDEZVOUS``, else through the job's folder, on one host.

    With more than one rank, an exception that nothing catches ends all ranks from now on.

    Raises:
        LaunchError: the environment names neither, there is no secret, a rank does not come, or is refused.
        ConfigError: the rendezvous is not host:port.
    """
    place, address, folder = env.place(), env.rendezvous(), env.job_dir()
    if address:
        secret = rendezvous.secret()
        exchange = rendezvous.exchange_at(address, place, secret)
    elif folder is not None:
        exchange = rendezvous.exchange_in(folder, place)
        secret = str(exchange(secrets.token_hex())[0]).encode()  # nobody else can read in the folder
    else:
        raise LaunchError(
            f"the transport tcp needs {env.RENDEZVOUS}=host:port, where rank 0 listens, or a job on one host: "
            "disttrain run --launcher local --transport tcp -n N script.py"
        )
    comm = join(place, exchange, secret, rendezvous.own_host(address))
    atexit.register(comm.leave)
    if comm.world_size > 1:
        abort_on_exception(comm)
        comm.join_node(env.host())
    return comm


def join(place: env.Place, exchange: Exchange, secret: bytes, host: str) -> "TcpCommunicator":
    """Return the communicator of a rank that is connected to all others; every rank calls this.

    Args:
        place: of this rank.
        exchange: returns the JSON values that all ranks have passed to it, in the order of their ranks.
        secret: the same on all ranks, known to nobody else.
        host: the address at which this rank listens, and others reach it.

    Raises:
        LaunchError: a rank does not come, or is refused.
    """
    deadline_s = time.monotonic() + rendezvous.JOIN_S
    with Listener(host) as listener:
        # The token tells this job from others that have the same secret.
        places = exchange([*listener.address, secrets.token_hex(16)])
        job = Pass(secret=secret, job=hashlib.sha256(repr(places).encode()).hexdigest())
        channels: dict[Claim, socket.socket] = {}
        try:
            for peer in range(place.rank):  # rank 0 dials nobody, so that each rank comes to accept others
                for channel in (_MESSAGES, _CONTROLS):
                    claim = Claim(place.rank, peer, channel)
                    channels[claim] = dial((places[peer][0], places[peer][1]), claim, job, deadline_s)
            higher = range(place.rank + 1, place.world_size)
            wanted = [Claim(peer, place.rank, channel) for peer in higher for channel in (_MESSAGES, _CONTROLS)]
            channels |= listener.accept(wanted, job, deadline_s)
        except BaseException:
            for connection in channels.values():
                connection.close()
            raise
    sockets: dict[int, dict[int, socket.socket]] = {_MESSAGES: {}, _CONTROLS: {}}
    for claim, connection in channels.items():
        sockets[claim.channel][claim.source + claim.dest - place.rank] = connection
    return TcpCommunicator(place, sockets[_MESSAGES], sockets[_CONTROLS])


class TcpCommunicator(FramedCommunicator):
    """A rank that is connected to all others.

    Args:
        place: of this rank.
        messages: connections by rank.
        controls: connections by rank, for control messages.
    """

    transport = "tcp"

    def __init__(
        self, place: env.Place, messages: Mapping[int, socket.socket], controls: Mapping[int, socket.socket]
    ) -> None:
        self._pipes = {rank: _Connection(each) for rank, each in messages.items()}
        self._controls = {rank: _Connection(each) for rank, each in controls.items()}
        super().__init__(place, self._pipes, self._controls)
        self._hung_up: dict[int, Callable[[], None]] = {}  # by descriptor
        self._control_ranks = {pipe.fileno(): rank for rank, pipe in self._controls.items()}
        self._speaking: set[int] = set()  # ranks that may have sent a control message
        # Each change once, whether that rank is listened to or not: what can be read or written is tried before sleep.
        self._epoll = select.epoll()
        for rank, pipe in self._pipes.items():
            self._watch(pipe, pipe.end)
            self._watch(self._controls[rank], partial(self._lose, rank))
            self._controls[rank].expect_answers()
        _open.add(self)

    def _watch(self, connection: "_Connection", hung_up: Callable[[], None]) -> None:
        number = connection.fileno()
        self._hung_up[number] = hung_up
        self._epoll.register(number, select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET)

    def leave(self) -> None:
        """Tell the others that this rank communicates no more, and end its connections."""
        progress.at(progress.Phase.LEFT)
        for rank in self._controls:
            self._say(rank, _FAREWELL, b"")
        for connection in (*self._pipes.values(), *self._controls.values()):
            connection.leave()
        self.close()

    def abort(self, exit_code: int) -> NoReturn:
        """End this process; the others notice, and raise `CommError` where they wait."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)

    def has_ended(self, rank: int) -> bool:
        """Return whether `rank` sends no more."""
        return self._pipes[rank].has_ended

    def await_news(self, is_done: Callable[[], bool]) -> None:
        """Return when `is_done`, or when something has changed, or after a while."""
        begin = time.monotonic()
        while time.monotonic() - begin < _SPIN_S:
            if is_done():
                return
            os.sched_yield()
        self._look(_LOOK_S)

    def check(self, limit_s: float = 0.0) -> None:
        """Raise `CommError` if a rank has ended without a word, or is out of reach, or does within `limit_s`."""
        deadline_s = time.monotonic() + limit_s
        while self.lost is None and (left_s := deadline_s - time.monotonic()) > 0:
            self._look(left_s)
        if self.lost is not None and self._controls[self.lost].error not in _OF_A_PROCESS:
            raise self._cut(self.lost, self._controls[self.lost])
        super().check()
        for rank, pipe in self._pipes.items():
            if limit_s and pipe.error not in _OF_A_PROCESS[:-1] and not self._control_inboxes[rank].has(_FAREWELL):
                raise self._cut(rank, pipe)

    def _cut(self, rank: int, connection: "_Connection") -> CommError:
        """Return the error of a connection to `rank` that was ended by something else than that rank."""
        where = f"between {connection.ends}"
        what = f"rank {self.rank} cannot go on without that rank in {progress.own().what_words}"
        if connection.error in _OUT_OF_REACH:
            silent = f"the host of rank {rank} has not answered for {_SILENCE_S:.0f} s"
            return CommError(f"{silent}, and {what}; it is off, or the network is down {where}")
        cut = f"something has cut a connection to rank {rank}, {where}"
        return CommError(f"{cut}, and {what}; the system says: {os.strerror(connection.error)}")

    def _told(self) -> tuple[int, bytes] | None:
        self._look(0)  # one question for all ranks
        for rank in tuple(self._speaking):
            data = self._control_inboxes[rank].next()
            if data is not None:
                return rank, data
            self._speaking.discard(rank)
        return None

    def _serve(self, rank: int) -> bool:
        self._look(0)
        self.check()
        has_ended = self.has_ended(rank)
        self.move()
        return has_ended

    def _look(self, limit_s: float) -> None:
        """Sleep until something has changed; what can be read or written is to be tried afterwards, before the next."""
        for number, events in self._epoll.poll(limit_s):
            if number in self._control_ranks:
                self._speaking.add(self._control_ranks[number])
            if events & _HANGS_UP:
                self._hung_up[number]()

    def _lose(self, rank: int) -> None:
        """Note that `rank` has ended: without it the job cannot go on, unless it has said that it leaves."""
        self._controls[rank].end()
        if self.lost is None and not self._control_inboxes[rank].has(_FAREWELL):
            if progress.is_kept():
                time.sleep(_SUPERVISED_S)
            self.lost = rank

    def close(self) -> None:
        """End the connections without a word."""
        for connection in (*self._pipes.values(), *self._controls.values()):
            connection.close()
        self._epoll.close()


def _close_all() -> None:
    """Leave the connections to the process that made them: held by its children, they would not end with it."""
    for comm in _open:
        comm.close()


os.register_at_fork(after_in_child=_close_all)


class _Connection:
    """A socket as a pipe: what there is no room for, or is not there yet, is not waited for."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self.fileno, self.close = connection.fileno, connection.close
        self.ends = "its host and this one"
        with contextlib.suppress(OSError):  # the other side has ended already
            self.ends = f"{connection.getsockname()[0]} and {connection.getpeername()[0]}"
        self.has_ended = False
        self.error = 0  # that has ended it, by `errno`
        self._buffer = np.empty(_READ_BYTES, np.uint8)
        self._ready = self._buffer[:0]  # of it: has been read from the socket, and asked for by nobody

    def expect_answers(self) -> None:
        """Have the system end the connection when that of the other side does not answer."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        limit_ms = int(1000 * _SILENCE_S)
        for option, value in (("KEEPIDLE", _ASK_S), ("KEEPINTVL", _ASK_S), ("USER_TIMEOUT", limit_ms)):
            self._socket.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{option}"), value)

    def end(self) -> None:
        """Note that the other side sends no more."""
        self.has_ended = True
        self.error = self.error or self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)

    def leave(self) -> None:
        """Send no more, and forget what has come: else closing would take back what is on its way to the other side."""
        with contextlib.suppress(OSError):  # the other side has ended before
            self._socket.shutdown(socket.SHUT_WR)
            while self._socket.recv_into(self._buffer.data):
                pass

    def write(self, parts: Sequence[HostArray]) -> int:
        """Write as many bytes of `parts` as there is room for, and return how many."""
        try:
            return self._socket.sendmsg([part.data for part in parts], [], socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0
        except OSError as error:
            self._fail(error)
            return 0

    def read(self, into: HostArray) -> int:
        """Read as many bytes as there are, at most as many as `into` has, and return how many."""
        if not self._ready.size:
            if into.size >= _READ_BYTES:
                return self._receive(into)
            self._ready = self._buffer[: self._receive(self._buffer)]
        count = min(into.size, self._ready.size)
        into[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _receive(self, into: HostArray) -> int:
        try:
            count = self._socket.recv_into(into.data)
        except BlockingIOError:
            return 0
        except OSError as error:
            self._fail(error)
            return 0
        self.has_ended |= count == 0
        return count

    def _fail(self, error: OSError) -> None:
        self.has_ended, self.error = True, self.error or error.errno or errno.EIO
