"""The supervisor: starts a job's processes, passes on what they write, and ends them together.

Each rank on this host has three pipes, by name, in the job's private folder: `out` and `err` carry what
it writes, `alive` its last word, and closes when it ends. They serve under every launcher, and tell which
rank was the first to go. A rank elsewhere does without: its launcher's own outputs serve.
"""

import contextlib
import dataclasses
import os
import selectors
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from disttrain import env, progress
from disttrain.errors import PREEMPTED, LaunchError
from disttrain.last_step import LastStep
from disttrain.progress import Record
from launch import leftovers, memory, mpirun, posix, stacks
from launch.diagnosis import HUNG, hang_in_words, last_words, memory_in_words, others_in_words
from launch.growth import Growth
from launch.job import Command, Job, commands
from launch.relay import HOLD_S, Sink, Stream
from launch.report import GROWTH, REFUSAL, Ending, killed, loss_in_words, read_reports, signal_in, told
from launch.restarts import Restarts
from launch.stragglers import Stragglers
from launch.watch import LOOK_S, RECORD, STACKS, Watch, read_records
from launch.worker import BEREFT, DONE, EXITED, FAILED, INTERRUPTED, PIPES

STOP_S = 2.0  # for exit handlers, after Ctrl-C
GRACE_S = 30.0  # a worker may save its work when it is asked to stop: Slurm and Kubernetes wait as long
FAIL_S = 1.0  # after a failure as well, but two seconds after it the job is over
LEAVE_S = 5.0  # for an MPI to end after all ranks: one that has lost some may wait for these

_NEVER_S = float("inf")
_CHUNK_BYTES = 1 << 16


def supervise(job: Job) -> int:
    """Run `job` to its end and return its exit code: 0 only when every rank succeeded.

    All descendants of this process are ended with the job, so the caller must have no others.

    Raises:
        LaunchError: the job cannot be started.
        ConfigError: there is no such launcher.
    """
    restarts = Restarts(job)
    with posix.caught_signals() as signals, contextlib.ExitStack() as held:
        last = LastStep.make() if job.max_restarts else None
        if last is not None:
            held.callback(last.close)
        running, ending = _start_with(restarts, job, job.workers, signals, last)
        while True:
            running.say(ending.report)
            kept = last.read() if last is not None else None
            said = restarts.after(ending, None if kept is None else kept[0])
            if not restarts.goes_on:
                running.say(said)
                return ending.code
            try:
                running, ending = _start_with(restarts, job, restarts.most, signals, last, said)
            except LaunchError as error:
                running.say(f"disttrain: the job cannot be started again: {error}\n")
                return ending.code


def _start_with(
    restarts: Restarts, job: Job, most: int, signals: int, last: LastStep | None, said: str = ""
) -> tuple["_Running", Ending]:
    """Run `job` once, on as many workers as can be started of the numbers to be tried; say so, after `said`.

    Args:
        restarts: knows these numbers.
        job: as it was asked for.
        most: how many workers it ends for, so that they can be started.
        signals: a descriptor that carries those of this process.
        last: where its last step is kept, if it is.
        said: what comes before how many they are.

    Raises:
        LaunchError: it can be started on none of them.
    """
    for workers in restarts.sizes:
        attempt = dataclasses.replace(job, workers=workers)
        growth = None if last is None else Growth(job, most, restarts.wait_s(workers))
        with tempfile.TemporaryDirectory(prefix="disttrain-") as folder:
            running = _Running(attempt, Path(folder), "" if last is None else last.address, growth)
            try:
                lines = commands(attempt)
                running.say(said and f"{said} on {workers} worker{'s' if workers > 1 else ''}\n")
                running.start(lines, signals)
                running.watch()
                if (refusal := Path(folder, REFUSAL)).exists():
                    restarts.doubt()
                    raise LaunchError(refusal.read_text())
            except LaunchError as error:
                if workers == restarts.sizes[-1]:
                    raise
                running.say(f"disttrain: {workers} workers cannot be started: {error}\n")
                continue
            finally:
                running.end()
            return running, running.verdict()
    raise AssertionError("there is always a number to try")


class _Running:
    """A job on its way, and what is known of its end."""

    def __init__(self, job: Job, folder: Path, last_step: str, growth: Growth | None) -> None:
        self._job = job
        self._growth = growth  # where a restart can mend it
        self._is_growing = False  # whether it has been asked to end, so that it can have more workers
        self._folder = folder
        self._last_step = last_step  # where it is kept, if it is
        self._selector = selectors.DefaultSelector()
        self._pipes: set[int] = set()
        self._streams: list[Stream] = []
        self._out = Sink(1)
        self._err = self._out if os.path.sameopenfile(1, 2) else Sink(2)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._launcher_pipes: set[int] = set()
        self._heard = b""  # what the launcher wrote of its own
        self._unsaid = b""  # the part of it that was held back
        self._has_failed = False
        self._code = 0  # of the first process that failed
        self._done: set[int] = set()  # ranks that have said so
        self._losses: list[tuple[int, float]] = []  # ranks that ended without a word, and when
        self._is_bereft = False  # whether ranks have said that they cannot go on without one that they have lost
        self._exits: dict[int, int] = {}  # by rank, what was given to `os._exit`
        self._asked = 0  # the signal that asked for the end
        self._asked_s = _NEVER_S
        self._deadline_s = _NEVER_S
        self._watch = Watch(job.workers, job.hang_timeout_s)
        self._stragglers = Stragglers()
        self._look_s = 0.0
        self._has_seen_all = False
        self._hang = ""  # what the watch has found
        self._culprit: int | None = None
        self._found_s = _NEVER_S
        self._kills = memory.kills()
        self._shared = leftovers.shared()

    def start(self, lines: list[Command], signals: int) -> None:
        """Start the job's processes; `signals` is a descriptor that carries those of this process."""
        posix.adopt_orphans()
        self._selector.register(signals, selectors.EVENT_READ, self._on_signals)
        try:
            for rank in range(self._job.workers):
                for name in PIPES:
                    path = self._folder / f"{name}.{rank}"
                    os.mkfifo(path, 0o600)
                    self._listen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), self._handler(name, rank))
            ends = self._launcher_pipe(self._out), self._launcher_pipe(self._err)
        except OSError as error:
            self._close_pipes()  # to end the job takes open files too
            raise LaunchError(
                f"{self._job.workers} workers need {len(PIPES)} pipes each, in {self._folder} and open here: {error}"
            ) from error
        self._lines = lines
        try:
            for line in lines:
                self._processes.append(self._process(line, *ends))
        finally:
            for end in ends:
                os.close(end)

    def watch(self) -> None:
        """Pass on outputs and signals until the processes have ended, or have had their time."""
        while None in (codes := [process.poll() for process in self._processes]):
            if not self._code and any(codes):
                self._serve(0)  # was it a rank? If so its pipe tells, before others fail because of it
                self._code = next(filter(None, codes))
                self._has_failed = True
            now_s = time.monotonic()
            self._look(now_s)
            self._grow(now_s)
            if self._have_survivors_ended:
                self._deadline_s = min(self._deadline_s, now_s + LEAVE_S)
            if self._has_failed and self._deadline_s == _NEVER_S:
                self._deadline_s = now_s + FAIL_S
                posix.signal_family(signal.SIGTERM)
            if now_s >= self._deadline_s:
                return
            self._serve(min(self._deadline_s - now_s, LOOK_S))

    def _look(self, now_s: float) -> None:
        """See where the ranks are, until one has failed: from then on they end because of that."""
        is_ending = self._has_failed or bool(self._asked)
        if self._has_seen_all or not (is_ending or now_s >= self._look_s):
            return
        self._look_s = now_s + LOOK_S
        records = self._records()
        finding = self._watch.look(now_s, records)
        self._has_seen_all = is_ending or finding is not None
        if is_ending:
            return
        if finding is None:
            for slow in self._stragglers.look(records) if self._job.hang_timeout_s else ():
                self.say(slow.words(records[slow.rank]))
            return
        self._found_s, self._has_failed = now_s, True
        able = {rank: sight for rank, sight in self._watch.sights.items() if sight.can_answer}
        stacks.ask({self._folder / STACKS.format(rank): sight.record.pid_here for rank, sight in able.items()})
        self._culprit = finding.rank
        self._hang = hang_in_words(finding, self._watch.sights, self._job.workers, self._folder)

    def _grow(self, now_s: float) -> None:
        """Ask all ranks to end after a step if more can be started; rank 0 heeds it."""
        if self._growth is None or self._is_growing or self._has_failed or self._asked:
            return
        self._is_growing = self._growth.look(now_s, self._left)
        for rank in range(self._job.workers) if self._is_growing else ():
            with contextlib.suppress(OSError):  # of one elsewhere there is none
                progress.ask_to_end(self._folder / RECORD.format(rank))

    def end(self) -> None:
        """End whatever is left of the job, and pass on its last words."""
        ours = {process.pid for process in self._processes}
        grace_s = min(max(self._deadline_s - time.monotonic(), 0.0), FAIL_S)
        for number, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, FAIL_S)):
            posix.signal_family(number)
            posix.await_family(wait_s, but=ours)
            with contextlib.suppress(subprocess.TimeoutExpired):
                for process in self._processes:
                    process.wait(wait_s)
        while self._serve(0):
            pass
        for stream in self._streams:
            stream.flush(_NEVER_S)
        for sink in {self._out, self._err}:
            sink.restore()
        self._selector.close()
        self._close_pipes()
        leftovers.remove(self._shared)

    def verdict(self) -> Ending:
        """Return how the job ended; where it failed, the report says who was the first, where, and why."""
        if not self._has_seen_all:
            self._watch.look(time.monotonic(), self._records())  # what is left of them
        codes = (self._code, *(process.returncode for process in self._processes), self._has_failed)
        code = 0 if self._have_survivors_ended else next(filter(None, codes), 0)
        number = signal_in(code, self._heard)
        losses = self._losses[self._job.workers - self._left :]
        lost, lost_s = losses[0] if losses else (None, _NEVER_S)
        joined = {rank for rank, sight in self._watch.sights.items() if sight.has_joined}
        deserters = [rank for rank, _ in losses if rank in joined]
        if self._is_bereft and losses:
            code, number = 128 + signal.SIGKILL, int(signal.SIGKILL)  # by which signal, nobody tells
        if lost in self._exits and (self._exits[lost] or lost in deserters):
            code, number = self._exits[lost], 0  # of those that were ended because of it the launcher may tell
        host = ""
        if (elsewhere := told(self._heard)) is not None and elsewhere.rank not in self._watch.sights:
            lost, host, code, number = elsewhere.rank, elsewhere.host, elsewhere.code, elsewhere.number
        memory = "" if host else memory_in_words(self._kills)
        loss = loss_in_words(lost, self._job.workers, code, number, memory=memory, host=host)
        if not (number or host or losses or joined or self._watch.sights or self._done):
            loss = f"disttrain: no rank has started; what starts them ended with exit code {code}, and said why above\n"
        loss += last_words(self._watch.sights, lost)
        if not code and deserters:
            code = 1  # MPICH ends all ranks, and calls it a success, when one of them calls os._exit(0)
        first = next(iter(read_reports(self._folder)), None)
        if first is not None and first.exit_code == PREEMPTED:
            if self._is_growing and not self._asked:
                return Ending(code=PREEMPTED, kind=GROWTH, workers=self._left)
            return Ending(code=PREEMPTED, report=first.interruption())
        if first is not None and first.time_s < min(self._asked_s, self._found_s):
            is_first = not number or first.time_s < lost_s
            text = first.words("first") if is_first else loss + first.words("then")
            text += self._others(first.rank if is_first else lost)
            if is_first:
                return self._failure(first.exit_code, text, "exception", first.rank, f"failed with {first.error}")
            return self._failure(first.exit_code, text, f"signal {number}", lost, killed(number, memory))
        if self._hang:
            return self._failure(HUNG, self._hang, "hang", self._culprit, "held up the others")
        if self._asked:
            return Ending(code=128 + self._asked)
        if not code:
            return Ending(code=0)
        # Of a signal the launcher knows no more than this; of anything else it may.
        loss += self._others(lost)
        if number:
            return self._failure(128 + number, loss, f"signal {number}", lost, killed(number, memory))
        loss = self._unsaid.decode(errors="replace") + loss
        return self._failure(code, loss, "exit", lost, f"ended with exit code {code}")

    @property
    def _left(self) -> int:
        """How many ranks the job has: fewer than it began with, where it goes on without those that it has lost."""
        return min((sight.record.world_size for sight in self._watch.sights.values()), default=self._job.workers)

    @property
    def _have_survivors_ended(self) -> bool:
        """Whether the job has gone on without ranks that it has lost, and all others are done."""
        return len(self._done) == self._left < self._job.workers and not self._has_failed

    def _failure(self, code: int, report: str, kind: str, rank: int | None, why: str) -> Ending:
        """Return an end that a restart may mend, unless the end was asked for."""
        seen = {each: sight.record for each, sight in self._watch.sights.items()}
        own = seen.values() if rank is None else [seen[rank]] if rank in seen else []
        last = max(own, key=lambda record: record.begun, default=None)
        return Ending(
            code=code,
            report=report,
            kind="" if self._asked else kind,
            rank=rank,
            workers=self._job.workers,
            why=why,
            run=0 if last is None else last.run,
            step=None if last is None else last.step,
            has_started=len(seen) == self._job.workers if rank is None else last is not None,
        )

    def say(self, text: str) -> None:
        """Write `text`, if there is any, to standard error, on lines of its own."""
        if not text:
            return
        self._err.finish()
        self._err.write(self, b"", text.encode(errors="backslashreplace"))

    def _records(self) -> dict[int, Record]:
        return read_records(self._folder, self._job.workers)

    def _others(self, but: int | None) -> str:
        return others_in_words(self._watch.sights, self._job.workers, but)

    def _process(self, line: Command, out: int, err: int) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                line.argv,
                env={**self._environment(), **line.env, env.JOB_DIR: str(self._folder)},
                stdin=subprocess.DEVNULL if os.isatty(0) else None,
                stdout=out,
                stderr=err,
                start_new_session=True,
                preexec_fn=posix.die_with_parent,
            )
        except OSError as error:
            raise LaunchError(f"{line.argv[0]} cannot be started: {error}") from error

    def _environment(self) -> dict[str, str]:
        """Return the environment, in which rich finds the terminal that workers cannot see."""
        own = {
            env.LAST_STEP: self._last_step,
            env.MIN_WORKERS: str(self._job.min_workers or self._job.workers),
            mpirun.OWN_FILES: str(self._folder),
        }
        if self._job.transport:
            own[env.TRANSPORT] = self._job.transport
        if not os.isatty(1):
            return {**os.environ, **own}
        columns = shutil.get_terminal_size().columns - len(self._label(self._job.workers - 1))
        return {"TTY_COMPATIBLE": "1", **os.environ, **own, "COLUMNS": str(columns)}

    def _label(self, rank: int) -> bytes:
        return b"[%d] " % rank if self._job.workers > 1 else b""

    def _handler(self, name: str, rank: int) -> Callable[[int], None]:
        """Return what handles the pipe `name` of `rank`."""
        if name == "alive":
            return partial(self._on_word, rank)
        return self._relay(self._out if name == "out" else self._err, self._label(rank))

    def _relay(self, sink: Sink, label: bytes) -> Callable[[int], None]:
        """Return what passes on to `sink` the bytes of a pipe."""
        stream = Stream(sink, label)
        self._streams.append(stream)
        return partial(self._on_output, stream)

    def _launcher_pipe(self, sink: Sink) -> int:
        """Return a descriptor for the launcher to write to."""
        pipe, end = os.pipe()
        self._launcher_pipes.add(pipe)
        self._listen(pipe, self._relay(sink, b""))
        return end

    def _close_pipes(self) -> None:
        while self._pipes:
            os.close(self._pipes.pop())

    def _listen(self, pipe: int, handler: Callable[[int], None]) -> None:
        self._pipes.add(pipe)
        self._selector.register(pipe, selectors.EVENT_READ, handler)

    def _serve(self, wait_s: float) -> bool:
        """Handle what has come, after waiting for it if need be; return whether there was anything."""
        if any(stream.is_waiting for stream in self._streams):
            wait_s = min(wait_s, HOLD_S)
        events = self._selector.select(min(wait_s, 3600.0))
        # Ranks first: whether one was lost decides what the launcher's words are worth.
        for key, _ in sorted(events, key=lambda event: event[0].fd in self._launcher_pipes):
            key.data(key.fd)
        for stream in self._streams:
            stream.flush(time.monotonic())
        return bool(events)

    def _on_output(self, stream: Stream, pipe: int) -> None:
        data = os.read(pipe, _CHUNK_BYTES)
        if not data:
            self._selector.unregister(pipe)
            return
        if pipe in self._launcher_pipes:
            self._heard = (self._heard + data)[-_CHUNK_BYTES:]
            if self._has_failed or self._losses or self._asked:
                self._unsaid += data  # that it ended badly, the verdict tells better
                return
        stream.feed(data, time.monotonic())

    def _on_word(self, rank: int, pipe: int) -> None:
        said = os.read(pipe, 2)
        word = said[:1]
        self._selector.unregister(pipe)
        self._has_failed |= word in (FAILED, INTERRUPTED, BEREFT)
        self._is_bereft |= word == BEREFT
        if word == INTERRUPTED:
            self._ask(signal.SIGINT)
        if word == DONE:
            self._done.add(rank)
        if word == EXITED:
            self._exits[rank] = said[1]
        if word in (b"", EXITED):
            self._losses.append((rank, time.monotonic()))  # epoll tells of them in the order in which they went

    def _on_signals(self, signals: int) -> None:
        """Pass a signal on to the launcher, which passes it on to the workers; a second one ends the job."""
        for number in os.read(signals, _CHUNK_BYTES):
            if number == signal.SIGCHLD:
                continue  # it has woken us up
            if number == signal.SIGUSR2:
                if self._growth is not None:
                    self._growth.hurry()
                continue
            if self._asked:
                self._deadline_s = 0
                continue
            self._ask(number)
            self._deadline_s = min(self._deadline_s, self._asked_s + (STOP_S if number == signal.SIGINT else GRACE_S))
            for process, line in zip(self._processes, self._lines, strict=False):
                process.send_signal(line.asked if number == signal.SIGTERM else number)

    def _ask(self, number: int) -> None:
        """Note the first signal that asks for the end: what fails later fails because of it."""
        if not self._asked:
            self._asked, self._asked_s = number, time.monotonic()
