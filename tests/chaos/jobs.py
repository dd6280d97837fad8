"""A job, its processes and its disk, as who disturbs them sees them."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil

from disttrain.errors import PREEMPTED

# The exit codes of a job that was asked to end: with its state saved, or before it had any, even before it listens.
ASKED = (PREEMPTED, 128 + signal.SIGTERM, -signal.SIGTERM)
KINDS = ("kill_one", "kill_all", "stop", "preempt", "damage", "kill_supervisor", "fill_disk")


def workers_of(process):
    """Return the pids of the ranks that run."""
    found = []
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    for child in children:
        try:
            if child.cmdline()[1:4] == ["-P", "-m", "launch.worker"]:
                found.append(child.pid)
        except psutil.Error:
            continue
    return sorted(found)


def await_end_of(job):
    """Wait for the workers of a supervisor that was killed: SIGTERM ends them."""
    end_s = time.monotonic() + 20
    while [left for left in job.left() if "psutil" in left]:
        assert time.monotonic() < end_s, job.left()
        time.sleep(0.05)
    for left in (job.folder / "temporary").iterdir():
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()  # with which `tempfile` tries a folder


class Disk:
    """A folder on a disk of 1 MB, if this user may mount one: `before` goes before the commands that are to see it."""

    def __init__(self, folder):
        self.before, self.path, self._holder = [], folder, None
        folder.mkdir()
        mount = 'mount -t tmpfs -o size=1m none "$0" && echo mounted && exec sleep inf'
        with contextlib.suppress(FileNotFoundError):
            self._holder = subprocess.Popen(
                ["unshare", "--mount", "sh", "-c", mount, str(folder)],
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            if self._holder.stdout.readline() == b"mounted\n":
                self.path = Path(f"/proc/{self._holder.pid}/root{folder}")
                inside = ["nsenter", "--target", str(self._holder.pid), "--mount", "sh", "-c"]
                self.before = [*inside, 'cd "$0" && exec "$@"', str(folder.parent)]

    @property
    def can_be_full(self):
        return bool(self.before)

    def fill(self):
        with contextlib.suppress(OSError), open(self.path / "filler", "wb", 0) as file:
            while True:
                file.write(bytes(4096))

    def free(self):
        (self.path / "filler").unlink(missing_ok=True)

    def close(self):
        if self._holder is not None:
            self._holder.kill()
            self._holder.communicate()


class Disturbed:
    """A job, and what is done to it.

    Args:
        job: the program.
        disk: that it saves to.
        chance: that chooses.
        command: of the job.
        kinds: names of the faults; all of them by default, that of the disk where there can be one.

    Attributes:
        faults: how many there were of each kind.
        starts: of the command: more than one where nobody was left to start the job again.
        given_up: how many of these because the same had happened again and again at one step.
        damaged: how many checkpoints.
    """

    def __init__(self, job, disk, chance, command, kinds=()):
        self._job, self._disk, self._chance, self._command = job, disk, chance, command
        self._kinds = [getattr(self, kind) for kind in kinds or KINDS if kind != "fill_disk" or disk.can_be_full]
        self._deck = []
        self._stopped = {}  # when each is to go on
        self._full_until_s = 0.0
        self._is_asked = False
        self.faults = {kind.__name__: 0 for kind in self._kinds}
        self.starts = self.given_up = self.damaged = 0
        self.has_finished = False
        self._start()

    def disturb(self):
        """Do what comes next: each kind equally often, in random order."""
        self._deck = self._deck or self._chance.sample(self._kinds, len(self._kinds))
        kind = self._deck.pop()
        self.faults[kind.__name__] += 1
        kind()

    def go_on(self, for_s):
        """Let the job run for so long, or to its end; start it again where it cannot do so by itself."""
        end_s = time.monotonic() + for_s
        while not self.has_finished and time.monotonic() < end_s:
            self._undo(time.monotonic())
            if self._process.poll() is not None:
                self._end()
            time.sleep(0.02)

    def leave(self):
        """End what is left, however the test ends."""
        self._undo(float("inf"))
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
            await_end_of(self._job)

    def kill_one(self):
        self._kill(self._workers[:1])

    def kill_all(self):
        self._kill(self._workers)

    def kill_launcher(self):
        """Kill what is between the supervisor and the ranks: mpiexec, and its proxy."""
        with contextlib.suppress(psutil.NoSuchProcess):
            children = [each.pid for each in psutil.Process(self._process.pid).children(recursive=True)]
            self._kill(sorted({*children} - {*self._workers}))

    def stop(self):
        for pid in self._workers[:1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                process.suspend()
                self._stopped[process] = time.monotonic() + self._chance.uniform(1, 3)

    def preempt(self):
        self._is_asked = True
        self._process.send_signal(signal.SIGTERM)

    def kill_supervisor(self):
        self._lose_supervisor()
        self._start()

    def damage(self):
        """Flip a bit of the newest checkpoint while nobody holds the last step in memory."""
        end_s = time.monotonic() + 5
        while len(self._saved) < 2 and not self.has_finished and time.monotonic() < end_s:
            self.go_on(0.1)
        self._lose_supervisor()
        saved = self._saved
        if len(saved) > 1:  # one to fall back to
            path = self._chance.choice([each for each in saved[-1].iterdir() if each.stat().st_size])
            data = bytearray(path.read_bytes())
            data[self._chance.randrange(len(data))] ^= 1 << self._chance.randrange(8)
            path.write_bytes(data)
            self.damaged += 1
        self._start()

    def fill_disk(self):
        self._disk.fill()
        self._full_until_s = time.monotonic() + self._chance.uniform(1, 3)

    @property
    def out(self):
        return (self._job.folder / "out").read_text()

    @property
    def err(self):
        return (self._job.folder / "err").read_text()

    @property
    def _saved(self):
        return sorted((self._disk.path / "run").glob("checkpoint-*"))

    @property
    def _workers(self):
        pids = workers_of(self._process)
        return self._chance.sample(pids, len(pids))

    def _kill(self, pids):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _lose_supervisor(self):
        self._process.kill()
        self._process.wait()
        self._undo(float("inf"))  # who is stopped does not hear that it is over; a full disk takes no bit
        await_end_of(self._job)

    def _undo(self, now_s):
        for process, until_s in tuple(self._stopped.items()):
            if now_s >= until_s:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()
                del self._stopped[process]
        if self._full_until_s and now_s >= self._full_until_s:
            self._disk.free()
            self._full_until_s = 0.0

    def _start(self):
        with open(self._job.folder / "out", "ab") as out, open(self._job.folder / "err", "ab") as err:
            self._process = self._job.start(*self._command, before=self._disk.before, stdout=out, stderr=err)
        self._is_asked = False
        self.starts += 1

    def _end(self):
        """Note how the job has ended, and start it again if that was not the end of training."""
        code = self._process.returncode
        if code == 0:
            self.has_finished = True
            return
        if not self._is_asked:
            assert "; a restart does not mend it" in self.err[-20_000:], (code, self.err[-20_000:])
            check_reasons(self.err)
            self.given_up += 1
        elif code not in ASKED:
            assert self._full_until_s, (code, self.err[-20_000:])  # what could not be saved is a failure
        self._start()


def check_reasons(said):
    """Check that each failure which a supervisor tells of is one that was brought about; return how many it tells."""
    reasons = re.findall(
        r"^disttrain: (?:restart \d+ of \d+, because|no restart:) (?:a rank|rank \d of 2) (.*)", said, re.MULTILINE
    )
    failures = r"was ended by SIGKILL|failed (with|3 times [^:]*:) disttrain\.errors\.CheckpointError: "
    assert all(re.match(failures, reason) for reason in reasons), sorted(set(reasons))
    return len(reasons)
