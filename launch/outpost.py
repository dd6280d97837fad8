"""What `--launcher ssh` runs on each host: `python -m launch.outpost 2-3/8 script.py args...`, for ranks 2 and 3 of 8.

To its ranks it is what the supervisor is to ranks beside it: it has a folder with their pipes and files, and ends them
together. All that it hears goes to `launch.far`, on the supervisor's host, and what it is to do comes from there:
messages, each a line, a JSON list. When these end, or nothing comes for a while, the connection or the supervisor is
gone, and the ranks are ended.

Through ssh they go by standard output and input. A rank that an MPI or srun has started, on another host than the
supervisor's, becomes an outpost too: `launch.stand_in`.
"""

import contextlib
import json
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil

import disttrain
from disttrain import env, progress
from launch import memory, posix
from launch.diagnosis import memory_in_words
from launch.report import Report, loss_in_words
from launch.supervise import FAIL_S, GRACE_S
from launch.watch import LOOK_S, RECORD, STACKS
from launch.worker import EXITED, FAILED, PIPES

BEAT_S = 2.0  # how often the supervisor's side says that it is there
LOST_S = 20.0  # without a word the connection is broken
TICK_S = 0.05
MARK = "\x1edisttrain "  # begins a message; shells may write before, or between
HELLO = {"version": disttrain.__version__}

_EFFORT_S = 1.0  # between two looks at what a rank uses, which costs a look at all processes

_CHUNK_BYTES = 1 << 16
_MIRRORED = ("exchange.", "report.")  # files of ranks that others, or the supervisor, are to have


def message(*parts: Any) -> bytes:
    """Return a message, on a line of its own."""
    return f"\n{MARK}{json.dumps(parts)}\n".encode()


class Messages:
    """Takes what comes apart, into messages and other lines."""

    def __init__(self) -> None:
        self._rest = b""
        self.other = b""  # what was no message

    def feed(self, data: bytes) -> Iterator[Any]:
        """Yield the messages that `data` completes."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(MARK.encode()):
                yield json.loads(line[len(MARK) :])
            elif line:
                self.other += line + b"\n"


def ranks_in(text: str) -> tuple[range, int]:
    """Return the ranks, and the number of all, of ``2-3/8``."""
    span, _, workers = text.partition("/")
    first, _, last = span.partition("-")
    return range(int(first), int(last) + 1), int(workers)


def main(argv: Sequence[str]) -> int:
    """Run a script as the ranks ``argv[0]``; return the exit code of the first that failed."""
    ranks, workers = ranks_in(argv[0])
    problem = "" if os.path.isfile(argv[1]) else f"does not have the script {argv[1]} in {os.getcwd()}"
    os.write(1, message("hello", {**HELLO, "address": _address(), "problem": problem}))
    with tempfile.TemporaryDirectory(prefix="disttrain-") as folder:
        place = {env.WORLD_SIZE: str(workers), env.LOCAL_SIZE: str(len(ranks))}
        if address := _address():
            place[env.INTERFACE] = address
        workers_of = {
            rank: {**place, env.RANK: str(rank), env.LOCAL_RANK: str(local_rank)}
            for local_rank, rank in enumerate(ranks)
        }
        # What a worker writes before it has opened its pipes goes to 2; 1 carries messages.
        options = {
            "stdin": subprocess.DEVNULL,
            "stdout": 2,
            "start_new_session": True,
            "preexec_fn": posix.die_with_parent,
        }
        return Outpost(workers, workers_of, argv[1:], Path(folder), (0, 1), options).run()


def _address() -> str:
    """Return the address at which this host was reached, or what the user says; empty where nobody says."""
    if address := env.interface() or env.ssh_address():
        return address
    with contextlib.suppress(OSError):
        return socket.gethostbyname(socket.gethostname())
    return ""


class Outpost:
    """Workers of one host, and what is passed on of them.

    Args:
        workers: number of all of the job.
        ranks: of those here, with what is added to the environment of each.
        argv: script and arguments.
        folder: for their pipes and files.
        descriptors: from which messages come, and to which they go.
        options: with which `subprocess.Popen` starts them.
    """

    def __init__(
        self,
        workers: int,
        ranks: Mapping[int, dict[str, str]],
        argv: Sequence[str],
        folder: Path,
        descriptors: tuple[int, int],
        options: dict[str, Any],
    ) -> None:
        self._workers, self._ranks, self._argv, self._folder = workers, ranks, argv, folder
        self._input, self._output = descriptors
        self._options = options
        self._selector = selectors.DefaultSelector()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._messages = Messages()
        self._heard_s = time.monotonic()
        self._is_lost = False  # nobody listens
        self._has_started = False
        self._asked = False  # the ranks have been asked to end
        self._deadline_s = float("inf")
        self._mirrored: set[str] = set()
        self._shown: dict[str, bytes] = {}  # by file
        self._proxies: dict[int, dict[str, str]] = {}  # of each rank, as it was told last
        self._looked_s: dict[int, float] = {}  # when its record has changed, or its effort was looked at
        self._mirrored_s = self._shown_s = 0.0
        self._spoken: set[int] = set()  # ranks whose end is known
        self._code = 0
        self._kills = memory.kills()

    def run(self) -> int:
        """Run the workers to their end; return the exit code of the first that failed."""
        self._selector.register(self._input, selectors.EVENT_READ, self._on_message)
        posix.adopt_orphans()
        os.set_blocking(self._output, False)  # a connection that is broken takes nothing more
        while not self._has_started and not self._is_lost:
            self._serve(TICK_S)
        while self._is_running and time.monotonic() < self._deadline_s:
            self._serve(TICK_S)
        while self._serve(0):
            pass
        for rank in self._processes.keys() - self._spoken:
            self._end(rank)
        for number in (signal.SIGTERM, signal.SIGKILL):
            posix.signal_family(number)
            posix.await_family(FAIL_S, but=())
            while self._serve(0):
                pass
        self._say("end", self._code)
        return self._code

    def _start(self) -> None:
        self._has_started = True
        environment = {**os.environ, env.JOB_DIR: str(self._folder)}
        environment.pop(env.SUPERVISOR, None)  # it is this process
        for rank, own in self._ranks.items():
            for name in PIPES:
                path = self._folder / f"{name}.{rank}"
                os.mkfifo(path, 0o600)
                pipe = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
                self._selector.register(pipe, selectors.EVENT_READ, partial(self._on_pipe, name, rank))
            self._processes[rank] = subprocess.Popen(
                (sys.executable, "-P", "-m", "launch.worker", *self._argv),
                env={**environment, **own},
                **self._options,
            )

    @property
    def _is_running(self) -> bool:
        """Whether a worker runs; the exit code of the first that failed is noted."""
        codes = [process.poll() for process in self._processes.values()]
        code = next(filter(None, codes), 0)
        self._code = self._code or (128 - code if code < 0 else code)
        return None in codes

    def _serve(self, wait_s: float) -> bool:
        """Handle what has come, after waiting for it if need be; return whether there was anything."""
        events = self._selector.select(wait_s)
        for key, _ in events:
            key.data(key.fd)
        if time.monotonic() > self._mirrored_s + TICK_S:
            self._mirror()
        if time.monotonic() > self._heard_s + LOST_S:
            self._lose()
        return bool(events)

    def _on_message(self, connection: int) -> None:
        try:
            data = os.read(connection, _CHUNK_BYTES)
        except OSError:
            data = b""
        self._heard_s = time.monotonic()
        if not data:
            self._lose()
        for kind, *parts in self._messages.feed(data):
            if kind == "start":
                self._start()
            elif kind == "file":
                self._mirrored.add(parts[0])
                put(self._folder / parts[0], parts[1].encode())
            elif kind == "asked":
                self._asked = True
            elif kind == "signal":
                self._asked |= parts[0] != signal.SIGUSR2  # which asks for stacks
                self._signal(parts[0])

    def _on_pipe(self, name: str, rank: int, pipe: int) -> None:
        data = os.read(pipe, _CHUNK_BYTES)
        if name != "alive":
            self._say(name, rank, data.decode("latin-1"))
        elif data and data[:1] != EXITED:
            self._mirror()  # its report first
            self._say(name, rank, data.decode("latin-1"))
            self._spoken.add(rank)
        else:
            self._end(rank)
        if not data or name == "alive":
            self._selector.unregister(pipe)
            os.close(pipe)

    def _end(self, rank: int) -> None:
        """Tell of a rank that has ended without a word of its own."""
        self._spoken.add(rank)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._processes[rank].wait(FAIL_S)
        code = self._processes[rank].returncode
        if not code:
            self._say("alive", rank, "")
            return
        number = -code if code < 0 else 0
        text = loss_in_words(rank, self._workers, code, number, memory=memory_in_words(self._kills))
        if record := progress.read(self._folder / RECORD.format(rank)):
            text += f"It was at: {record.words}; its pid was {record.pid}\n"
        Report(
            rank=rank,
            world_size=self._workers,
            host=socket.gethostname(),
            time_s=time.monotonic(),
            exit_code=128 + number if number else code,
            text=text,
            error=f"signal {number}" if number else f"exit code {code}",
        ).write(self._folder)
        self._mirror()
        self._say("alive", rank, FAILED.decode())

    def _mirror(self) -> None:
        """Pass on the files of this host's ranks that others are to have."""
        self._mirrored_s = now_s = time.monotonic()
        if now_s > self._shown_s + LOOK_S:
            self._shown_s = now_s
            self._show()
        for entry in os.scandir(self._folder):
            if (
                entry.name.startswith(_MIRRORED)
                and not entry.name.endswith(".tmp")
                and entry.name not in self._mirrored
            ):
                self._mirrored.add(entry.name)
                self._say("file", entry.name, Path(entry).read_text())

    def _show(self) -> None:
        """Pass on where the ranks are, what becomes of their processes, and their stacks, if that is news."""
        for rank, process in self._processes.items():
            for kind, name in (("record", RECORD.format(rank)), ("stacks", STACKS.format(rank))):
                with contextlib.suppress(FileNotFoundError):
                    data = (self._folder / name).read_bytes()
                    if data != self._shown.get(name):
                        self._shown[name] = data
                        self._looked_s[rank] = time.monotonic()
                        self._say(kind, rank, data.decode("latin-1"))
            self._show_process(rank, process)

    def _show_process(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        """Pass on what the watch asks the system of ranks beside it, if that is news."""
        proxy = {**self._proxies.get(rank, {}), "state": "" if process.poll() is not None else posix.state(process.pid)}
        if proxy["state"] not in (psutil.STATUS_RUNNING, psutil.STATUS_SLEEPING):
            proxy["kernel"] = posix.kernel_words(process.pid)
        if time.monotonic() > self._looked_s.get(rank, 0.0) + _EFFORT_S:  # its record is still
            self._looked_s[rank] = time.monotonic()
            proxy["effort"] = f"{zlib.crc32(repr(posix.effort(process.pid)).encode()):x}"
        if proxy != self._proxies.get(rank):
            self._proxies[rank] = proxy
            self._say("process", rank, proxy)

    def _say(self, *parts: Any) -> None:
        data = memoryview(message(*parts))
        while data and not self._is_lost:
            if not select.select([], [self._output], [], LOST_S)[1]:
                self._lose()
                return
            try:
                data = data[os.write(self._output, data) :]
            except BlockingIOError:
                continue
            except OSError:
                self._lose()

    def _lose(self) -> None:
        """Have the ranks end, as nobody listens any more: at once if they have been asked to before."""
        if not self._is_lost:
            self._is_lost = True
            self._code = self._code or 1
            self._selector.unregister(self._input)
            self._deadline_s = time.monotonic() + (0 if self._asked else GRACE_S)
            self._signal(signal.SIGTERM)

    def _signal(self, number: int) -> None:
        for process in self._processes.values():
            process.send_signal(number)


def put(path: Path, data: bytes) -> None:
    """Write a file in one step: nobody reads half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    temporary.rename(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
