"""The supervisor's side of `--launcher ssh`: `python -m launch.far 2-3/8 HOST HOSTS ssh ... HOST COMMAND`.

Runs ssh, at whose other end is `launch.outpost`, and is to the supervisor what that host's ranks would be beside it:
what they write goes into their pipes, and the files that they leave into the job's folder. Files of ranks elsewhere, by
which ranks find each other, go to the outpost. Ranks start when all hosts have answered.
"""

import contextlib
import dataclasses
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import disttrain
from disttrain import env
from disttrain.errors import LaunchError
from disttrain.progress import Proxy
from launch import posix
from launch.outpost import BEAT_S, TICK_S, Messages, message, put, ranks_in
from launch.report import REFUSAL, Report
from launch.supervise import GRACE_S
from launch.watch import PROXY, RECORD, STACKS
from launch.worker import FAILED, PIPES

HELLO_S = 25.0  # for a host to answer: what is wrong is to be said within half a minute
_SSH_FAILED = 255
_FILES = re.compile(r"exchange\.\d+\.(\d+)|report\.(\d+)\.json")
_LOOPBACK = ("127.", "::1", "lo")
_CHUNK_BYTES = 1 << 16
_WORDS_BYTES = 2000


def main(argv: Sequence[str]) -> int:
    """Run the command ``argv[3:]`` for the ranks ``argv[0]``, on ``argv[1]``, one of ``argv[2]`` hosts."""
    ranks, workers = ranks_in(argv[0])
    folder = env.job_dir()
    assert folder is not None  # the supervisor says
    try:
        with posix.caught_signals() as signals, _started(argv[3:]) as ssh:
            signal.signal(signal.SIGUSR2, lambda *_: None)  # it comes to `signals` as well
            try:
                return Session(ssh, ranks, workers, host=argv[1], hosts=int(argv[2]), folder=folder).run(signals)
            finally:
                ssh.kill()
    except LaunchError as error:
        return refuse(folder, error)


def is_supervised(folder: Path) -> bool:
    """Return whether a supervisor looks into the job's `folder`: lines that a dry run has printed run without one."""
    return (folder / f"{PIPES[0]}.0").exists()


def refuse(folder: Path, error: LaunchError) -> int:
    """Have the supervisor say that the job cannot be started; return the exit code."""
    if not is_supervised(folder):
        _say(f"Error: {error}\n")
    with contextlib.suppress(FileExistsError), (folder / REFUSAL).open("x") as file:  # the first one's word counts
        file.write(str(error))
    return 2


class Far:
    """Ranks of a far host: what is told of them is left where the supervisor looks.

    Args:
        ranks: which.
        workers: number of all ranks.
        host: where they are.
        folder: the job's.
        send: passes bytes on to the outpost.
    """

    def __init__(
        self, ranks: Sequence[int], workers: int, *, host: str, folder: Path, send: Callable[[bytes], None]
    ) -> None:
        self._ranks, self._workers, self._folder, self._send = ranks, workers, folder, send
        self.host = host
        self.code: int | None = None  # the outpost's last word
        self.has_answered = False
        self._is_supervised = is_supervised(folder)
        self._pipes = {(name, rank): self._pipe(name, rank) for name in PIPES for rank in ranks}
        self._proxies = {rank: Proxy(pid=os.getpid()) for rank in ranks}
        self._known: set[str] = set()  # files that the outpost has, or has left
        self._messages = Messages()
        self._handlers: dict[str, Callable[..., None]] = {
            "hello": self._on_hello,
            "out": partial(self._pass_on, "out"),
            "err": partial(self._pass_on, "err"),
            "alive": self._on_alive,
            "file": self._on_file,
            "record": self._on_record,
            "process": self._on_process,
            "stacks": self._on_stacks,
            "end": self._on_end,
        }

    def _pipe(self, name: str, rank: int) -> int:
        """Return where to write what `rank` says on its pipe `name`."""
        if self._is_supervised:
            return os.open(self._folder / f"{name}.{rank}", os.O_WRONLY)
        return os.open(os.devnull, os.O_WRONLY) if name == "alive" else os.dup(1 if name == "out" else 2)

    def feed(self, data: bytes) -> None:
        """Take what the outpost has sent.

        Raises:
            LaunchError: its host lacks what the ranks need, or sends what is none of theirs.
        """
        for kind, *parts in self._messages.feed(data):
            self._handlers[kind](*parts)

    def tell(self, *parts: Any) -> None:
        """Send a message to the outpost."""
        self._send(message(*parts))

    def lose(self, why: str) -> None:
        """Report the ranks whose end was not told: nothing more will be heard of them, because of `why`."""
        for rank in [rank for rank in self._ranks if ("alive", rank) in self._pipes]:
            report = Report(
                rank=rank,
                world_size=self._workers,
                host=self.host,
                time_s=time.monotonic(),
                exit_code=1,
                text=f"the connection to host {self.host} is lost: {why}\n",
                error="the loss of its host",
            )
            self._leave(report)
            self._on_alive(rank, FAILED.decode())

    def close(self) -> None:
        """Close the ranks' pipes."""
        while self._pipes:
            os.close(self._pipes.popitem()[1])

    def _on_hello(self, there: dict[str, Any]) -> None:
        """Note that the outpost is there.

        Raises:
            LaunchError: its host lacks what the ranks need.
        """
        self.has_answered = True
        self.host = there.get("host", self.host)
        if there["version"] != disttrain.__version__:
            raise LaunchError(
                f"host {self.host} has disttrain {there['version']}, expected {disttrain.__version__}, as here: "
                "install the same version on all hosts"
            )
        if problem := there["problem"]:
            raise LaunchError(f"host {self.host} {problem}")

    def _on_alive(self, rank: int, word: str) -> None:
        self._pass_on("alive", rank, word)
        os.close(self._pipes.pop(("alive", rank)))
        self._proxies[rank] = Proxy(pid=os.getpid(), state="")
        self._show(rank)

    def _on_file(self, name: str, text: str) -> None:
        """Leave a file in the job's folder, as one of the host's ranks would.

        Raises:
            LaunchError: it is no file of theirs: another host is not to write what it likes.
        """
        found = _FILES.fullmatch(name)
        if found is None or int(found[1] or found[2]) not in self._ranks:
            raise LaunchError(f"host {self.host} sends a file {name!r}, which is none of its ranks'")
        self._known.add(name)
        if name.startswith("report."):
            self._leave(Report(**{**json.loads(text), "time_s": time.monotonic()}))  # its clock is another
        else:
            put(self._folder / name, text.encode())

    def _leave(self, report: Report) -> None:
        report.write(self._folder)
        if not self._is_supervised:
            _say(report.text)

    def _on_record(self, rank: int, text: str) -> None:
        """Show where a rank is, to those who look for it among the records of this host."""
        assert rank in self._ranks
        if not (self._folder / PROXY.format(rank)).exists():
            (self._folder / STACKS.format(rank)).touch()
            self._show(rank)
        put(self._folder / RECORD.format(rank), text.encode("latin-1"))

    def _on_process(self, rank: int, facts: dict[str, str]) -> None:
        if ("alive", rank) in self._pipes:
            known = {name: facts[name] for name in ("state", "effort", "kernel") if name in facts}
            self._proxies[rank] = Proxy(pid=os.getpid(), **known)
            self._show(rank)

    def _show(self, rank: int) -> None:
        put(self._folder / PROXY.format(rank), json.dumps(dataclasses.asdict(self._proxies[rank])).encode())

    def _on_stacks(self, rank: int, text: str) -> None:
        assert rank in self._ranks
        put(self._folder / STACKS.format(rank), text.encode("latin-1"))

    def _on_end(self, code: int) -> None:
        self.code = code

    def _pass_on(self, name: str, rank: int, text: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # the supervisor is gone
            data = text.encode("latin-1")
            while data:
                data = data[os.write(self._pipes[name, rank], data) :]


class Session(Far):
    """A far host and its ranks, over ssh.

    Args:
        ssh: that has started the outpost.
        ranks: which.
        workers: number of all ranks.
        host: where they are, as ssh knows it.
        hosts: number of all hosts.
        folder: the job's.
    """

    def __init__(
        self, ssh: subprocess.Popen[bytes], ranks: range, workers: int, *, host: str, hosts: int, folder: Path
    ) -> None:
        super().__init__(ranks, workers, host=host, folder=folder, send=self._write)
        self._ssh, self._hosts = ssh, hosts
        self._words = b""  # what ssh says, and the shell there
        self._has_started = self._is_over = False
        self._asked = 0  # the first signal
        self._beat_s = 0.0

    def run(self, signals: int) -> int:
        """Serve until ssh has ended; return the exit code of the first rank that failed.

        Args:
            signals: a descriptor that carries those of this process.

        Raises:
            LaunchError: the host does not answer, or lacks what the ranks need.
        """
        assert self._ssh.stdout is not None
        assert self._ssh.stderr is not None
        begin_s, parent, deadline_s = time.monotonic(), os.getppid(), float("inf")
        with selectors.DefaultSelector() as selector:
            selector.register(self._ssh.stdout, selectors.EVENT_READ, self._on_messages)
            selector.register(self._ssh.stderr, selectors.EVENT_READ, self._on_words)
            selector.register(signals, selectors.EVENT_READ, self._on_signals)
            while not self._is_over and time.monotonic() < deadline_s:
                for key, _ in selector.select(TICK_S):
                    data = os.read(key.fd, _CHUNK_BYTES)
                    key.data(data)
                    if not data:
                        selector.unregister(key.fd)
                self._tick(time.monotonic())
                if self._asked and not self._has_started:
                    return 128 + self._asked
                if not self.has_answered and time.monotonic() > begin_s + HELLO_S:
                    raise LaunchError(f"host {self.host} has not answered within {HELLO_S:.0f} s{self._said()}")
                if os.getppid() != parent:  # it has been killed, and this process sent SIGTERM: ranks may save
                    deadline_s = min(deadline_s, time.monotonic() + GRACE_S)
        return self._verdict()

    def _on_messages(self, data: bytes) -> None:
        self._is_over = not data
        self.feed(data)

    def _on_words(self, data: bytes) -> None:
        self._words = (self._words + data)[-_WORDS_BYTES:]
        if self.has_answered:
            os.write(2, data)

    def _on_signals(self, data: bytes) -> None:
        for number in data:
            if number == signal.SIGCHLD:
                continue
            if number != signal.SIGUSR2:  # which asks for stacks
                self._asked = self._asked or number
            self.tell("signal", number)

    def _on_hello(self, there: dict[str, Any]) -> None:
        os.write(2, self._words)
        super()._on_hello(there)
        put(self._folder / f"host.{self._ranks[0]}", json.dumps([self.host, there["address"]]).encode())

    def _tick(self, now_s: float) -> None:
        """Say that this side is there; have the ranks start when all hosts are; pass on files of others."""
        if now_s > self._beat_s + BEAT_S:
            self._beat_s = now_s
            self.tell("beat")
        if self._has_started:
            for entry in os.scandir(self._folder):
                if (
                    entry.name.startswith("exchange.")
                    and not entry.name.endswith(".tmp")
                    and entry.name not in self._known
                ):
                    self._known.add(entry.name)
                    self.tell("file", entry.name, Path(entry).read_text())
        elif len(found := list(self._folder.glob("host.*[0-9]"))) == self._hosts:
            self._has_started = True
            self._check_addresses(dict(json.loads(file.read_text()) for file in found))
            self.tell("start")

    def _check_addresses(self, addresses: dict[str, str]) -> None:
        """Refuse an address of this host alone, beside others.

        Raises:
            LaunchError: there is one, or a host does not know its own.
        """
        if self._hosts == 1:
            return
        for host, address in addresses.items():
            if not address or address.startswith(_LOOPBACK):
                raise LaunchError(
                    f"host {host} was reached at {address or 'no address'}, where other hosts do not reach it: "
                    "name it as the others know it, or say where: DISTTRAIN_INTERFACE"
                )

    def _write(self, data: bytes) -> None:
        assert self._ssh.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: its output tells
            os.write(self._ssh.stdin.fileno(), data)

    def _verdict(self) -> int:
        """Return the exit code of the first rank that failed, when ssh has ended, or was waited for long enough.

        Raises:
            LaunchError: the host has never answered.
        """
        if self.code is not None:
            return self.code
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._ssh.wait(1)
        if not self.has_answered and self._ssh.returncode == _SSH_FAILED:
            raise LaunchError(
                f"host {self.host} cannot be reached by ssh{self._said()}; `ssh {self.host} true` must work, and ask "
                "nothing"
            )
        if not self.has_answered:
            raise LaunchError(
                f"host {self.host} cannot start workers: its shell ended with exit code {self._ssh.returncode}"
                f"{self._said()}; expected there, as here: the folder {os.getcwd()}, and {sys.executable} with "
                f"disttrain {disttrain.__version__}"
            )
        self.lose(f"ssh ended with exit code {self._ssh.returncode}{self._said()}")
        return 1

    def _said(self) -> str:
        """Return what ssh and the shell there have said, to be appended; empty where that is nothing."""
        text = (self._words + self._messages.other).decode(errors="replace").strip()
        return f": {text}" if text else ""


def _say(text: str) -> None:
    os.write(2, text.encode(errors="backslashreplace"))


def _started(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start ssh, which leaves signals to this process."""
    try:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=_ignore_signals
        )
    except OSError as error:
        raise LaunchError(f"{command[0]} cannot be started: {error}") from error


def _ignore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
