"""The parent's end of a worker: a process, or a job, that is asked for slices, and is ended whatever happens."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import systems
from launch.job import Command, Job, commands

ROOT = Path(__file__).resolve().parents[1]
END_S = 2.0  # for a worker to end by itself when its input does
_LAST_LINES = 3

# before a framework is imported; one core
_THREADS = dict.fromkeys(
    (
        "OMP_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "MKL_NUM_THREADS",
        "NUMEXPR_NUM_THREADS",
        "VECLIB_MAXIMUM_THREADS",
        "TORCHINDUCTOR_COMPILE_THREADS",
        "DISTTRAIN_THREADS",
    ),
    "1",
)


class GapError(Exception):
    """There is no figure, and why.

    Args:
        reason: for the table.
        is_failure: False where something is only not there: a framework, a layer.
    """

    def __init__(self, reason: str, *, is_failure: bool) -> None:
        super().__init__(reason)
        self.is_failure = is_failure


class Worker:
    """What measures one task of one system on one workload; a context manager that ends it.

    Args:
        task: its name.
        system: its name.
        workload: its name.
        limit_s: for each answer.
        workers: number of processes; several are a job of the launcher's, of which rank 0 answers.
    """

    def __init__(self, task: str, system: str, workload: str, *, limit_s: float, workers: int = 1) -> None:
        self._words = (task, systems.module_name(system), workload, str(workers))
        self._env = {**os.environ, **_THREADS, **systems.environment(system)}
        self._workers = workers
        self._limit_s = limit_s
        self._answers = b""

    def __enter__(self) -> "Worker":
        self._complaints = tempfile.TemporaryFile()
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        words = (*self._words, str(time.monotonic()), str(os.getpid()))
        command = Command(argv=(sys.executable, "-P", "-m", "benchmarks.worker", *words))
        if self._workers > 1:
            (command,) = commands(
                Job(workers=self._workers, script=str(ROOT / "benchmarks/worker.py"), arguments=words)
            )
        self._process = subprocess.Popen(
            command.argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            env={**self._env, **command.env, "PYTHONPATH": path},
            start_new_session=True,  # a group, with what a compiler starts
        )
        self._is_idle = False
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            # one in the middle of something would not look at its input
            self._process.wait(END_S if self._is_idle else 0)
        self._kill()
        self._process.wait()
        self._process.stdout.close()
        self._complaints.close()

    def ready(self) -> dict[str, Any]:
        """Return the worker's description of what it measures, once it is ready.

        Raises:
            GapError: it will not be.
        """
        answer = self._answer("get ready")
        if "absent" in answer:
            raise GapError(answer["absent"], is_failure=False)
        return answer

    def slice(self, seconds: float) -> dict[str, Any]:
        """Return the "values" measured in `seconds`, at least one, and what else the task tells.

        Raises:
            GapError: the worker has ended, or does not answer.
        """
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # its end is told below
            self._process.stdin.write(f"{seconds}\n".encode())
            self._process.stdin.flush()
        return self._answer("measure", seconds)

    def _answer(self, what: str, extra_s: float = 0.0) -> dict[str, Any]:
        """Return the worker's next answer; it is to `what`, which may take `extra_s` by itself."""
        assert self._process.stdout
        self._is_idle = False
        end_s = time.monotonic() + self._limit_s + extra_s
        while b"\n" not in self._answers:
            if not select.select([self._process.stdout], [], [], max(0.0, end_s - time.monotonic()))[0]:
                self._kill()  # now: it would take the core from the others
                raise GapError(f"took more than {self._limit_s:g} s to {what}{self._last_words()}", is_failure=True)
            data = os.read(self._process.stdout.fileno(), 1 << 16)
            if not data:
                raise GapError(f"{self._end_in_words()}{self._last_words()}", is_failure=True)
            self._answers += data
        self._is_idle = True
        line, _, self._answers = self._answers.partition(b"\n")
        # an mpiexec writes the rank before it
        answer: dict[str, Any] = json.loads(line[line.index(b"{") :])
        return answer

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _end_in_words(self) -> str:
        code = self._process.wait()
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def _last_words(self) -> str:
        self._complaints.seek(0)
        lines = [line for line in self._complaints.read().decode(errors="replace").splitlines() if line.strip()]
        return "".join(f"\n{line}" for line in lines[-_LAST_LINES:])
