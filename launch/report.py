"""A failure as a file: what a worker leaves for its supervisor, and how that is put into words."""

import json
import os
import re
import signal
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

REFUSAL = "refusal"  # a file in the job's folder: why a launcher has started no worker
GROWTH = "growth"
_MAYBE_MEMORY = "if nobody sent it, the host may have run out of memory"
# How MPICH and Open MPI say it; MPICH's exit code alone is ambiguous: 9 is SIGKILL, and os._exit(9).
_SIGNAL = re.compile(rb"\(signal (\d+)\)|on\s+signal (\d+)")
# srun ends with the highest of the codes, also of tasks that it has ended; the first that it tells of is the cause.
_SRUN = re.compile(
    rb"^srun: error: (\S+): tasks? (\d+)[\d,-]*: (?:Exited with exit code (\d+)|([A-Z][a-z ]+))", re.MULTILINE
)
_NAMES = {signal.strsignal(number): int(number) for number in signal.Signals}


@dataclass(frozen=True, kw_only=True)
class Report:
    """The end of a rank that failed.

    Attributes:
        rank: who.
        world_size: of how many.
        host: where.
        time_s: when, by `time.monotonic`, which is common to the processes of a host.
        exit_code: what the job is to end with; never 0.
        text: the traceback, with all notes.
        error: its last line without them, shortened.
    """

    rank: int
    world_size: int
    host: str
    time_s: float
    exit_code: int
    text: str
    error: str = ""

    def write(self, folder: Path) -> None:
        """Leave this report in `folder`, in one step: nobody reads half of it."""
        target = folder / f"report.{self.rank}.json"
        temporary = target.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(self)))
        os.replace(temporary, target)

    def words(self, order: str) -> str:
        """Return who failed, where, and why; the traceback is last. `order` is "first", or "then"."""
        return (
            f"disttrain: rank {self.rank} of {self.world_size} failed {order}, on host {self.host}, "
            f"exit code {self.exit_code}:\n{self.text}"
        )

    def interruption(self) -> str:
        """Return what is to be said of a job that was asked to end, and has saved its state."""
        return (
            f"disttrain: the job was asked to end before it was done, and ends with exit code {self.exit_code}: "
            f"{self.text.splitlines()[0]}\nThe same command goes on from where it was.\n"
        )


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a job ended, or an attempt at it.

    Attributes:
        code: its exit code.
        report: what is to be said of it; empty: nothing.
        kind: "exception", "hang", "exit" or "signal N"; GROWTH, where it has ended so that more workers can go on;
            empty where a restart is of no use: it is done, or was asked to end.
        rank: the first that failed, None where that is not known.
        workers: how many there were.
        why: what it did, in a few words.
        step: the one that this rank had begun last, None before the first, or where that is not known; where no rank
            is known, the last of all that are seen.
        run: how many calls of `fit` had begun.
        has_started: whether this rank ever ran; where none is known, whether all did, as far as this host sees.
    """

    code: int
    report: str = ""
    kind: str = ""
    rank: int | None = None
    workers: int = 1
    why: str = ""
    step: int | None = None
    run: int = 0
    has_started: bool = True

    @property
    def cause(self) -> str:
        """Who failed, and why, in a few words."""
        return f"{self._who} {self.why}, {'before its first step' if self.step is None else f'in step {self.step}'}"

    def diagnosis(self, times: int) -> str:
        """Return who has failed so many times, where, and how."""
        where = "before its first step" if self.step is None else f"at step {self.step}"
        return f"{self._who} failed {times} times {where}: {self.why.removeprefix('failed with ')}"

    @property
    def _who(self) -> str:
        return "a rank" if self.rank is None else f"rank {self.rank} of {self.workers}"


def read_reports(folder: Path) -> list[Report]:
    """Return the reports in `folder`, the first failure first."""
    found = [Report(**json.loads(path.read_text())) for path in folder.glob("report.*.json")]
    return sorted(found, key=lambda report: report.time_s)


@dataclass(frozen=True, kw_only=True)
class Told:
    """What srun tells of the first rank that failed: `number` is that of a signal, 0 where none ended it."""

    rank: int
    host: str
    code: int
    number: int


def told(said: bytes) -> Told | None:
    """Return what a launcher tells of the first rank that failed, None where it tells of none."""
    match = _SRUN.search(said)
    if match is None:
        return None
    number = _NAMES.get((match[4] or b"").decode().strip(), 0)
    return Told(rank=int(match[2]), host=match[1].decode(), code=int(match[3] or 128 + number), number=number)


def signal_in(exit_code: int, said: bytes) -> int:
    """Return the signal that ended a worker, 0 where none did.

    Args:
        exit_code: as `subprocess` gives it: negative for a signal.
        said: what the launcher wrote of its own.
    """
    number = 0
    if exit_code < 0:
        number = -exit_code
    elif match := _SIGNAL.search(said):
        number = int(match[1] or match[2])
    elif exit_code > 128:
        number = exit_code - 128
    return number if number in set(signal.Signals) else 0


def loss_in_words(
    rank: int | None, world_size: int, exit_code: int, number: int, *, memory: str = "", host: str = ""
) -> str:
    """Return what is known of a worker that ended without a report.

    Args:
        rank: the first on this host, None where none is known.
        world_size: of how many.
        exit_code: of the launcher.
        number: of the signal that ended it, 0 where none is known.
        memory: what is known of memory that was lacking.
        host: where it was, if not here.
    """
    who = "a rank" if rank is None else f"rank {rank} of {world_size}, on host {host or socket.gethostname()},"
    if not number and host:
        return f"disttrain: {who} failed first, exit code {exit_code}; what it has written is above\n"
    if not number:
        return f"disttrain: {who} ended with exit code {exit_code}, without an exception\n"
    hint = f"; {memory or _MAYBE_MEMORY}" if number == signal.SIGKILL else ""
    return f"disttrain: {who} was ended by signal {number} ({signal.Signals(number).name}){hint}\n"


def killed(number: int, memory: str) -> str:
    """Return what became of a process that a signal has ended, in a few words; `memory` as of `loss_in_words`."""
    lacked = ", for lack of memory" if memory and number == signal.SIGKILL else ""
    return f"was ended by {signal.Signals(number).name}{lacked}"
