"""The parent's end of a worker: a process that is asked for steps, and is ended whatever happens."""

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
    """A process with one system's model of one workload; a context manager that ends it.

    Args:
        module: of the system.
        workload: its name.
        core: to run on.
        limit_s: for each answer.
    """

    def __init__(self, module: str, workload: str, *, core: int, limit_s: float) -> None:
        words = (module, workload, str(core), str(os.getpid()))
        self._command = [sys.executable, "-P", "-m", "benchmarks.worker", *words]
        self._limit_s = limit_s
        self._answers = b""

    def __enter__(self) -> "Worker":
        self._words = tempfile.TemporaryFile()
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            env={**os.environ, **_THREADS, "PYTHONPATH": path},
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
        self._words.close()

    def ready(self) -> dict[str, Any]:
        """Return the worker's description of its model, once it is ready.

        Raises:
            GapError: it will not be.
        """
        answer: dict[str, Any] = self._answer("get ready")
        if "absent" in answer:
            raise GapError(answer["absent"], is_failure=False)
        return answer

    def steps(self, seconds: float) -> list[float]:
        """Return the times, in seconds, of the steps taken in `seconds`; at least one is.

        Raises:
            GapError: the worker has ended, or does not answer.
        """
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # its end is told below
            self._process.stdin.write(f"{seconds}\n".encode())
            self._process.stdin.flush()
        times: list[float] = self._answer("take steps", seconds)
        return times

    def _answer(self, what: str, extra_s: float = 0.0) -> Any:
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
        return json.loads(line)

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _end_in_words(self) -> str:
        code = self._process.wait()
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def _last_words(self) -> str:
        self._words.seek(0)
        lines = [line for line in self._words.read().decode(errors="replace").splitlines() if line.strip()]
        return "".join(f"\n{line}" for line in lines[-_LAST_LINES:])
