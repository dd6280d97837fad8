"""A job goes on through faults of all kinds that come at random, to the bits of a run that nobody disturbs.

    python -m pytest -v tests/chaos/test_soak.py                                   # about half a minute
    SOAK_S=3600 python -m pytest -v -m long tests/chaos/test_soak.py               # an hour at each rate of faults

By default the long form takes half an hour at each rate. SOAK_SEED chooses another series of faults.
"""

import contextlib
import itertools
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from disttrain.errors import PREEMPTED
from tests.chaos.jobs import await_end_of, workers_of

STEP_S, STEPS_PER_EPOCH = 0.1, 8
SHORT_S = 12.0
KINDS = 7  # of faults: the short form has each once
LONG_S = float(os.environ.get("SOAK_S", "1800"))
SEED = int(os.environ.get("SOAK_SEED", "1"))
ENDLESS = "100000"  # restarts
# The exit codes of a job that was asked to end: with its state saved, or before it had any, even before it listens.
ASKED = (PREEMPTED, 128 + signal.SIGTERM, -signal.SIGTERM)


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


class Soak:
    """A job, and what is done to it.

    Attributes:
        faults: how many there were of each kind.
        starts: of the command: more than one where nobody was left to start the job again.
        given_up: how many of these because the same had happened again and again at one step.
        damaged: how many checkpoints.
    """

    def __init__(self, job, disk, chance, command):
        self._job, self._disk, self._chance, self._command = job, disk, chance, command
        kinds = [self.kill_one, self.kill_all, self.stop, self.preempt, self.damage, self.kill_supervisor]
        self._kinds = [*kinds, *([self.fill_disk] if disk.can_be_full else [])]
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
            assert "in a row, which a restart does not mend" in self.err[-20_000:], (code, self.err[-20_000:])
            check_reasons(self.err)
            self.given_up += 1
        elif code not in ASKED:
            assert self._full_until_s, (code, self.err[-20_000:])  # what could not be saved is a failure
        self._start()


def read(notes):
    """Return, for each attempt, what its supervisor had in use, and its steps with their times."""
    attempts = []
    for line in notes.splitlines():
        words = line.split()
        if words[0] == "supervisor":
            attempts.append(([int(word) for word in words[1:]], []))
        else:
            attempts[-1][1].append((int(words[0]), float(words[1])))
    return attempts


def check_use(attempts):
    """Check that no supervisor has more files or threads at its last attempt than at its first; return its growth."""
    grown_kb, most = 0, 0
    for _, each in itertools.groupby((use for use, _ in attempts), key=lambda use: use[0]):
        (_, files, threads, kb), *_, last = [*each] * 2
        assert last[1:3] == [files, threads], (files, threads, last)
        grown_kb, most = max(grown_kb, last[3] - kb), max(most, kb)
    return grown_kb, most


def check_reasons(said):
    """Check that each failure which a supervisor tells of is one that was brought about; return how many it tells."""
    reasons = re.findall(
        r"^disttrain: (?:restart \d+ of \d+, because|no restart:) (?:a rank|rank \d of 2) (.*)", said, re.MULTILINE
    )
    failures = ("was ended by SIGKILL", "failed with disttrain.errors.CheckpointError: ")
    assert all(reason.startswith(failures) for reason in reasons), sorted(set(reasons))
    return len(reasons)


@pytest.mark.timeout(300 + 4 * LONG_S)
@pytest.mark.parametrize(
    ("length_s", "between_s", "most", "transport"),
    [
        pytest.param(SHORT_S, 2.0, KINDS, "shm", id="short"),
        pytest.param(LONG_S, 60.0, math.inf, "shm", id="long-each-minute", marks=pytest.mark.long),
        pytest.param(LONG_S, 15.0, math.inf, "tcp", id="long-each-quarter", marks=pytest.mark.long),
    ],
)
def test_same_bits_through_faults_of_all_kinds(program, figures, length_s, between_s, most, transport):
    shutil.copy(Path(__file__).with_name("soaked.py"), program.folder)
    epochs = str(round(length_s / STEP_S / STEPS_PER_EPOCH))
    program.limit_s = LONG_S
    alone = program.run("run", "soaked.py", epochs, "0")
    assert alone.exit_code == 0, alone.err
    (program.folder / "steps").unlink()
    command = ["run", "-n", "2", "--launcher", "local", "--transport", transport, "--max-restarts", ENDLESS]
    command += ["soaked.py", epochs, str(STEP_S), "files/run"]
    chance = random.Random(SEED)
    disk = Disk(program.folder / "files")
    begin_s = time.monotonic()
    soak = Soak(program, disk, chance, command)
    try:
        while not soak.has_finished:
            assert time.monotonic() - begin_s < 200 + 3 * length_s, soak.err[-20_000:]
            soak.go_on(chance.expovariate(1 / between_s))
            if not soak.has_finished and sum(soak.faults.values()) < most:
                soak.disturb()
    finally:
        soak.leave()
        disk.close()
    took_s = time.monotonic() - begin_s
    (end,) = set(re.findall(r"finished .*", soak.out))
    assert end in alone.out
    restarts = check_reasons(soak.err)
    assert ("checkpoint damaged, trying the one before it" in soak.err) == (soak.damaged > 0)
    attempts = read((program.folder / "steps").read_text())
    grown_kb, kb = check_use(attempts)
    steps = [step for _, each in attempts for step, _ in each]
    gaps_s = [after[1] - before[1] for _, each in attempts for before, after in itertools.pairwise(each)]
    useful_s = max(steps) * statistics.median(gaps_s)
    figures.append(
        f"soak of {took_s:.0f} s, a fault each {between_s:.0f} s ({transport}): {sum(soak.faults.values())} faults "
        f"{soak.faults}, {restarts} restarts, {soak.starts} starts of the command ({soak.given_up} after it gave up), "
        f"{soak.damaged} checkpoints damaged, "
        f"{len(steps) - max(steps)} of {max(steps)} steps taken twice; useful: {useful_s / took_s:.1%} of the time; "
        f"a supervisor of {kb} kB grew by {grown_kb} kB"
    )
