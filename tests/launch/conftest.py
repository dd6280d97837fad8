"""The program `disttrain` in a process of its own, in a folder of its own."""

import dataclasses
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from disttrain.errors import LaunchError
from launch.mpirun import find_mpi

LIMIT_S = 60.0  # for what must end, however slow the machine


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished:
    """A program that has ended."""

    exit_code: int
    out: str
    err: str
    time_s: float  # of its end, by time.monotonic


class Program:
    """Starts `disttrain run` in `folder`; all its processes can be told by a token in their environment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.limit_s = LIMIT_S
        self.token = uuid.uuid4().hex
        (folder / "temporary").mkdir()
        foreign = ("PMI", "OMPI_", "PRTE_", "HYDRA_", "MPI_LOCAL", "SLURM_", "DISTTRAIN_")
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        self.env |= {"TMPDIR": str(folder / "temporary"), "TEST_TOKEN": self.token}

    def script(self, text: str, name: str = "script.py") -> str:
        (self.folder / name).write_text(text)
        return name

    def start(self, *arguments: str, before: Sequence[str] = (), **options) -> subprocess.Popen[str]:
        """Start it behind the command `before`, which is to end by executing the rest."""
        command = [*before, sys.executable, "-P", "-c", "from launch.cli import main; main()", *arguments]
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=self.folder, env=self.env, text=True, **{**streams, **options})

    def finish(self, process: subprocess.Popen[str]) -> Finished:
        out, err = process.communicate(timeout=self.limit_s)
        return Finished(exit_code=process.returncode, out=out, err=err, time_s=time.monotonic())

    def run(self, *arguments: str) -> Finished:
        return self.finish(self.start(*arguments))

    def await_file(self, name: str) -> str:
        """Return what a worker wrote to the file `name`, by renaming or in one piece, once it has."""
        end_s = time.monotonic() + LIMIT_S
        while time.monotonic() < end_s:
            path = self.folder / name
            if path.exists() and (text := path.read_text()):
                return text
            time.sleep(0.01)
        raise TimeoutError(f"no worker wrote {name}")

    def left(self) -> Sequence[str]:
        """Return what is left of the job: processes, and temporary files."""
        found = [str(path) for path in (self.folder / "temporary").iterdir()]
        for process in psutil.process_iter():
            try:
                if process.environ().get("TEST_TOKEN") == self.token:
                    found.append(str(process))
            except psutil.Error:
                continue
        return found


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    program = Program(tmp_path)
    yield program
    assert program.left() == []


@pytest.fixture
def mpi() -> None:
    """Skip a test where there is no MPI."""
    try:
        find_mpi()
    except LaunchError as error:
        pytest.skip(str(error))
