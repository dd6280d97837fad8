"""Python stacks of processes that do not answer: asked for by a signal, read from a file, told as tracebacks."""

import contextlib
import os
import re
import signal
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

import disttrain
import launch

ANSWER_S = 0.5  # for all stacks together
_WRITING_S = 0.05

_FRAME = re.compile(r'  File "(.*)", line (\d+) in (.*)')
_OURS = tuple(os.path.dirname(package.__file__ or "") + os.sep for package in (disttrain, launch))
_RUNNER = (os.path.join(_OURS[1], "worker.py"), "<frozen runpy>")

Frame = tuple[str, int, str]  # file, line, function


def ask(files: Mapping[Path, int]) -> None:
    """Have processes write their stacks, each to a file of `files`, which gives its pid; wait a moment for it."""
    for pid in {pid for path, pid in files.items() if path.exists()}:  # else it is not prepared, and would end
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR2)
    end_s = time.monotonic() + ANSWER_S
    while time.monotonic() < end_s and not all(path.exists() and path.stat().st_size for path in files):
        time.sleep(0.005)
    time.sleep(_WRITING_S)


def read(path: Path) -> list[Frame]:
    """Return the frames, the script's first, of the thread that served the signal, which is the main one."""
    with contextlib.suppress(OSError):
        for block in path.read_text(errors="replace").split("\n\n"):
            if block.startswith("Current thread"):
                frames = [(m[1], int(m[2]), m[3]) for m in map(_FRAME.match, block.splitlines()) if m]
                return [frame for frame in reversed(frames) if frame[0] not in _RUNNER]
    return []


def as_traceback(frames: list[Frame]) -> str:
    """Return `frames` as the traceback of an exception has them, with their lines of code."""
    return "Stack (most recent call last):\n" + "".join(
        traceback.StackSummary.from_list([(file, line, name, None) for file, line, name in frames]).format()
    )


def place(frames: list[Frame]) -> str:
    """Return file and line of the innermost frame that is not the library's; empty where there is none."""
    own = [f"{file}:{line}" for file, line, _ in frames if not file.startswith((*_OURS, "<frozen "))]
    return own[-1] if own else ""
