"""A rank fails in every way in every phase: the job ends in time, names it, and leaves nothing behind."""

import dataclasses
import re
import shutil
from pathlib import Path

import pytest

from launch.watch import BUSY, IDLE
from tests.chaos.conftest import Row

TIMEOUT_S = 1.0  # for the watch: lower than its default, so that this takes less time
MARGIN_S = 8.0  # for a machine that is busy

PHASES = ["start", "data", "forward", "bucket", "optimizer", "checkpoint", "evaluation", "callback", "shutdown"]
ELSEWHERE = ["start", "checkpoint", "callback", "shutdown"]  # not within a step
FAILURES = [
    "exception",
    "exit 0",
    "exit 3",
    "_exit 0",
    "SIGKILL",
    "SIGSTOP",
    "endless loop",
    "sleep",
    "extra call",
    "missing call",
]
WORDS = {  # in the record
    "start": "the script's own code, before its first step",
    "data": r"data, after step \d+",
    "forward": r"step \d+, forward",
    "bucket": r"step \d+, backward, \d bucket\(s\) on their way",
    "optimizer": r"step \d+, optimizer",
    "checkpoint": "checkpoint, after step 0",
    "evaluation": r"evaluation, batch \d, after step 49",
    "callback": r"callback, after step \d+",
    "shutdown": r"shutdown, after step \d",
}


@dataclasses.dataclass(frozen=True)
class Cell:
    failure: str
    phase: str
    ranks: int = 2
    transport: str = "mpi"

    @property
    def culprit(self):
        return 0 if self.phase == "checkpoint" else 1

    @property
    def limit_s(self):
        """How long the job may go on after the failure."""
        if self.failure in ("endless loop", "sleep") and self.phase in ELSEWHERE:
            return TIMEOUT_S * (BUSY if self.failure == "endless loop" else IDLE + 1)
        return 2.0  # what ends a process; one timeout for SIGSTOP, a loop or a call that differs, and to ask for stacks

    @property
    def says(self):
        """What the report must match."""
        rank, words = self.culprit, WORDS[self.phase]
        who = f"disttrain: rank {rank} of {self.ranks}"
        if self.failure == "exception":
            note = "" if self.phase in ("start", "shutdown") else f"{words}\n"
            return rf"{who} failed first, .*training.py.*KeyError: 'only here'\n{note}rank {rank} of {self.ranks}, host"
        if self.failure == "exit 3":
            return rf"{who} failed first, .*exit code 3:\nSystemExit: 3\n.*at \S*training.py:\d+\n"
        if self.failure == "SIGKILL":
            return rf"{who}, on host .*, was ended by signal 9 \(SIGKILL\).*\nIt was at: {words}; its pid was \d+"
        if self.failure == "_exit 0":
            ended = rf", on host .*, ended with exit code 0, without an exception\nIt was at: {words}"
            return rf"{who}({ended}| has left the job)|rank {rank} has ended without a word, .* cannot go on without it"
        if self.failure == "exit 0":
            return rf"(rank {rank} has left the job, .* waits for it in|{who} has left the job, and the others wait)"
        if self.failure == "SIGSTOP":
            return (
                rf"{who} is stopped by a signal, .*: {words}(; waits in .*)?\nIt does not tell its stack: T \(stopped\)"
            )
        if self.failure in ("endless loop", "sleep"):
            return (
                rf"{who} is stuck, on host .*, pid \d+, .*: {words}, at \S*training.py:\d+\n.*training.py\", line \d+"
            )
        # of a collective too many or too few: both calls, or, where the script ends before another one, who has left
        call = r": call \d+, [^;]*, at \S+:\d+"
        calls = rf"(rank {rank}{call}; rank \d{call}|rank \d{call}; rank {rank}{call})"
        return rf"ranks make different calls, the [a-z ]+ differs: {calls}|rank \d has left the job"


def is_failure(cell):
    """Return whether `cell` can fail: exit handlers neither raise nor exit, and rank 0 alone writes a checkpoint.

    A loop outside of a step, which is left alone for two minutes, is for the watch: one job of each launcher will do.
    """
    if cell.failure == "endless loop" and cell.phase in ELSEWHERE and (cell.ranks, cell.transport) not in JOBS[1:3]:
        return False
    if (cell.failure, cell.phase) == ("missing call", "checkpoint"):
        return False
    return cell.phase != "shutdown" or cell.failure in ("SIGKILL", "SIGSTOP", "endless loop", "sleep")


JOBS = [(2, "mpi"), (3, "mpi"), (2, "shm"), (3, "shm"), (2, "tcp")]
ALL = [cell for job in JOBS for f in FAILURES for p in PHASES if is_failure(cell := Cell(f, p, *job))]
SHORT = [  # each failure and each phase once
    Cell("exception", "data"),
    Cell("exit 0", "evaluation", 3),
    Cell("exit 3", "start"),
    Cell("_exit 0", "callback"),
    Cell("SIGKILL", "checkpoint", 3),
    Cell("SIGSTOP", "shutdown"),
    Cell("endless loop", "optimizer", 3),
    Cell("sleep", "bucket"),
    Cell("extra call", "forward"),
    Cell("missing call", "forward", 3),
    Cell("exit 0", "forward", 2, "shm"),
    Cell("SIGKILL", "bucket", 3, "shm"),
    Cell("SIGSTOP", "optimizer", 2, "shm"),
    Cell("missing call", "evaluation", 2, "shm"),
    Cell("exception", "bucket", 2, "tcp"),
    Cell("SIGKILL", "forward", 2, "tcp"),
    Cell("SIGSTOP", "bucket", 2, "tcp"),
]


def parameter(cell):
    marks = () if cell in SHORT else pytest.mark.long
    name = f"{cell.failure}-{cell.phase}-{cell.ranks}-{cell.transport}".replace(" ", "_")
    return pytest.param(cell, id=name, marks=marks)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("cell", [parameter(cell) for cell in ALL])
def test_a_rank_that_fails_is_named_in_time(request, program, table, cell):
    done = run(request, program, cell, TIMEOUT_S)
    took_s = done.time_s - float(program.await_file("failed_s"))
    said = next((line for line in done.err.splitlines() if line.startswith("disttrain: ")), "")
    table.append(Row(**dataclasses.asdict(cell), took_s=took_s, said=shortened(said)))
    assert re.search(cell.says, done.err, re.DOTALL), done.err
    assert done.exit_code != 0
    assert took_s < cell.limit_s + MARGIN_S


FALSE_ALARMS = {
    "a pause within a step": ("pause", "forward", 5.0, 3.0),
    "a slow first step": ("long", "first step", TIMEOUT_S, 4.0),
    "a long callback": ("long", "callback", TIMEOUT_S, 4.0),
    "a long checkpoint": ("long", "checkpoint", TIMEOUT_S, 4.0),
}


@pytest.mark.parametrize(
    "transport", [pytest.param(each, marks=() if each == "mpi" else pytest.mark.long) for each in ("mpi", "shm", "tcp")]
)
@pytest.mark.parametrize("name", FALSE_ALARMS)
def test_what_only_takes_long_is_left_alone(request, program, name, transport):
    failure, phase, timeout_s, seconds = FALSE_ALARMS[name]
    cell = Cell(failure, phase, 2, transport)
    done = run(request, program, cell, timeout_s, seconds)
    assert done.exit_code == 0, done.err
    assert done.err == ""
    assert done.out.count("trained") == cell.ranks
    program.await_file("failed_s")  # it did take long


def run(request, program, cell, timeout_s, seconds=0.0):
    if cell.transport == "mpi":
        request.getfixturevalue("mpi")  # skips where there is none
    shutil.copy(Path(__file__).with_name("training.py"), program.folder)
    program.limit_s = 200.0
    program.env["OPENBLAS_NUM_THREADS"] = "1"
    options = ["-n", str(cell.ranks), "--hang-timeout", str(timeout_s)]
    if cell.transport != "mpi":
        options += ["--launcher", "local", "--transport", cell.transport]
    return program.run("run", *options, "training.py", cell.failure, cell.phase, str(seconds))


def shortened(said):
    """Return what is the same on every machine and in every run."""
    return re.sub(r", on host [^,]*|, pid \d+|/\S*/", "", said.removeprefix("disttrain: ")).rstrip(":")
