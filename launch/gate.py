"""What starts an MPI's launcher, or srun, for ranks on several hosts: `python -m launch.gate 8 HOST mpiexec ...`.

It listens for ranks on other hosts than this one, each of which is an outpost of its own (`launch.stand_in`),
and is to the supervisor what they would be beside it, as `launch.far` is over ssh. Whoever connects has to prove that
it knows the job's secret. Signals are passed on to the launcher, and its exit code is that of the job.
"""

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import psutil

from disttrain import env
from disttrain.comm import rendezvous
from disttrain.errors import LaunchError
from launch import posix
from launch.far import Far, is_supervised, refuse
from launch.outpost import BEAT_S, LOST_S, TICK_S
from launch.stand_in import watch_of
from launch.supervise import FAIL_S, GRACE_S
from launch.watch import RECORD

_CHUNK_BYTES = 1 << 16
_ELSEWHERE = "192.0.2.1:9"  # an address that nobody has (RFC 5737): the way there is the way to most; nothing is sent
_LOSS_S = 2 * FAIL_S  # a connection that ends with the job is no loss: by then the launcher has ended as well


def main(argv: Sequence[str]) -> int:
    """Run the command ``argv[2:]`` for `argv[0]` workers, which reach this host where it reaches the host `argv[1]`."""
    folder = env.job_dir()
    assert folder is not None  # the supervisor says
    workers = int(argv[0])
    if not is_supervised(folder):
        os.execvp(argv[2], list(argv[2:]))  # noqa: S606 - the user's own launcher
    try:
        with posix.caught_signals() as signals, contextlib.ExitStack() as held:
            signal.signal(signal.SIGUSR2, lambda *_: None)  # it comes to `signals` as well
            listener = held.enter_context(rendezvous.Listener(address_towards(argv[1])))
            return Gate(workers, folder, listener).run(argv[2:], signals)
    except LaunchError as error:
        return refuse(folder, error)


def address_towards(host: str) -> str:
    """Return an address of this host at which others reach it.

    Args:
        host: one of them; empty where none is known.

    Raises:
        LaunchError: it has none.
    """
    if env.interface():
        return rendezvous.own_host()
    found = []
    with contextlib.suppress(OSError):  # it is known to ssh alone
        found += [rendezvous.own_host(f"[{host}]:9")] if host else []
    with contextlib.suppress(OSError):
        found.append(socket.gethostbyname(socket.gethostname()))
    with contextlib.suppress(OSError):
        found.append(rendezvous.own_host(_ELSEWHERE))
    ups = [name for name, stats in psutil.net_if_stats().items() if stats.isup]
    addresses = [each for name in ups for each in psutil.net_if_addrs().get(name, [])]
    found += [each.address for each in addresses if each.family == socket.AF_INET]
    for address in found:
        if not address.startswith("127.") and address != "::1":
            return address
    raise LaunchError(
        f"this host has no address that other hosts reach, only {', '.join(found)}; {env.INTERFACE} names another"
    )


class Gate:
    """The ranks on other hosts that have come, and the launcher that has started them.

    Args:
        workers: number of all ranks.
        folder: the job's.
        listener: where ranks come to.
    """

    def __init__(self, workers: int, folder: Path, listener: rendezvous.Listener) -> None:
        self._workers, self._folder, self._listener = workers, folder, listener
        self._selector = selectors.DefaultSelector()
        self._job = rendezvous.Pass(secret=rendezvous.secret(), job=watch_of(workers))
        self._away = {rendezvous.Claim(rank, 0, 0) for rank in range(workers)}  # have not come
        self._far: dict[socket.socket, Far] = {}
        self._lost: list[tuple[float, Far, str]] = []  # since when, and why
        self._beat_s = 0.0

    def run(self, command: Sequence[str], signals: int) -> int:
        """Run `command` to its end, and return its exit code.

        Args:
            command: the launcher.
            signals: a descriptor that carries those of this process.

        Raises:
            LaunchError: it cannot be started, or a rank's host has another disttrain.
        """
        host, port = self._listener.address
        try:
            self._launcher = subprocess.Popen(
                command,
                env={**os.environ, env.SUPERVISOR: f"[{host}]:{port}" if ":" in host else f"{host}:{port}"},
                preexec_fn=posix.die_with_parent,
            )
        except OSError as error:
            raise LaunchError(f"{command[0]} cannot be started: {error}") from error
        self._selector.register(signals, selectors.EVENT_READ, self._on_signals)
        parent, deadline_s = os.getppid(), float("inf")
        try:
            while time.monotonic() < deadline_s and not (self._has_ended and not self._far):
                for key, _ in self._selector.select(TICK_S):
                    key.data(key.fileobj)
                self._tick(time.monotonic())
                if self._has_ended:  # what is on its way is all there will be
                    deadline_s = min(deadline_s, time.monotonic() + FAIL_S)
                if os.getppid() != parent:  # it has been killed, and this process sent SIGTERM: ranks may save
                    deadline_s = min(deadline_s, time.monotonic() + GRACE_S)
        finally:
            self._launcher.kill()
        code = self._launcher.wait()
        return 128 - code if code < 0 else code

    @property
    def _has_ended(self) -> bool:
        return self._launcher.poll() is not None

    def _tick(self, now_s: float) -> None:
        """Let in who comes, say that this side is there, and report the ranks that were lost while the job goes on."""
        self._away -= {claim for claim in self._away if (self._folder / RECORD.format(claim.source)).exists()}
        if not self._away:
            self._listener.close()
        for claim, connection in self._listener.admit(self._away, self._job, 0).items() if self._away else ():
            self._away.remove(claim)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * LOST_S))
            send = partial(_send, connection)
            self._far[connection] = Far([claim.source], self._workers, host="", folder=self._folder, send=send)
            self._selector.register(connection, selectors.EVENT_READ, self._on_message)
        if now_s > self._beat_s + BEAT_S:
            self._beat_s = now_s
            for far in self._far.values():
                far.tell("beat")
        for since_s, far, why in self._lost if not self._has_ended else ():
            if now_s > since_s + _LOSS_S:
                far.lose(why)

    def _on_message(self, connection: socket.socket) -> None:
        far, why = self._far[connection], "it has ended without a word"
        try:
            data = connection.recv(_CHUNK_BYTES)
        except OSError as error:
            data, why = b"", str(error)
        had_answered = far.has_answered
        far.feed(data)
        if far.has_answered and not had_answered:
            far.tell("start")
        if not data:
            del self._far[connection]
            self._selector.unregister(connection)
            connection.close()
            if far.code is None:
                self._lost.append((time.monotonic(), far, why))
            else:
                far.close()

    def _on_signals(self, signals: int) -> None:
        for number in os.read(signals, _CHUNK_BYTES):
            if number == signal.SIGUSR2:  # which asks for stacks
                for far in self._far.values():
                    far.tell("signal", number)
            elif number != signal.SIGCHLD:
                self._launcher.send_signal(number)
                for far in self._far.values():
                    far.tell("asked")


def _send(connection: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):  # it has ended, or its outpost does not read: what comes from there tells
        connection.send(data)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
