"""`--launcher ssh`: workers on hosts that ssh reaches; no MPI needed, unless the transport is `mpi`.

A command for each host runs ssh, which runs `launch.outpost` there, which starts the workers. Each goes on with what
`launch.far` says on its standard input, and ends when that ends.
"""

import os
import re
import secrets
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from disttrain import env
from disttrain.errors import ConfigError, LaunchError
from launch import mpirun
from launch.job import Command, Job, across_hosts
from launch.mpirun import Mpi

OPTIONS = ("hosts", "ssh", "env")

# No question can be answered, and a host that does not answer, or is lost, is to be known within half a minute.
_SSH = ("-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5")
# These say how ranks meet, or are secret: command lines can be read by others.
_NOT_PASSED_ON = (env.SECRET, env.SECRET_FILE, env.RENDEZVOUS, env.TRANSPORT, env.LAST_STEP)
_HOST = re.compile(r"([\w.@%-]+|\[[\w:.%]+\])(?::(\d+))?")
_SLOTS = re.compile(r"slots\s*=\s*(\d+)")
_IGNORED = re.compile(r"max[-_]slots\s*=\s*\d+")


@dataclass(frozen=True, kw_only=True)
class Host:
    """A host, by the name that ssh knows it by, and how many workers it takes."""

    name: str
    slots: int


def commands(job: Job) -> list[Command]:
    """Return the commands that start the workers of `job`, one for each host, or one for MPI.

    Raises:
        ConfigError: no hosts are named, or not as expected.
        LaunchError: there are fewer slots than workers, or no MPI for the transport `mpi`.
    """
    hosts = taken(hosts_of(job.options.get("hosts", "")), job.workers)
    ssh = (*(job.words("ssh") or ["ssh"]), *_SSH)
    passed = passed_on(os.environ, job.options.get("env", ""))
    if job.transport == "mpi":
        line = mpi_command(job, hosts, ssh, mpirun.find_mpi())
        return [across_hosts(job, line, hosts[-1].name.rpartition("@")[2], secrets.token_hex(), os.environ)]
    if job.transport == "shm":
        raise LaunchError("workers of several hosts share no memory: leave out --transport, which is then tcp")
    return own_commands(job, hosts, ssh, passed, os.getcwd())


def own_commands(
    job: Job, hosts: Sequence[Host], ssh: Sequence[str], environment: Mapping[str, str], folder: str
) -> list[Command]:
    """Return a command for each of `hosts`, as many of whose slots are taken as it has."""
    settings = [f"{name}={value}" for name, value in environment.items()]
    if job.workers > 1:
        settings.append(f"{env.TRANSPORT}={job.transport or 'tcp'}")
    lines, first = [], 0
    for host in hosts:
        ranks = f"{first}-{first + host.slots - 1}/{job.workers}"
        outpost = (job.python, "-P", "-m", "launch.outpost", ranks, job.script, *job.arguments)
        there = f"cd {shlex.quote(folder)} && exec {shlex.join(('env', *settings, *outpost))}"
        far = (job.python, "-P", "-m", "launch.far", ranks, host.name, str(len(hosts)))
        lines.append(Command(argv=(*far, *ssh, host.name, there)))
        first += host.slots
    return lines


def hosts_of(value: str) -> list[Host]:
    """Return the hosts that the option ``hosts`` names: a file, or ``a,b:2``.

    A line of a file is ``node1 slots=2``, as Open MPI has it, or ``node1:2``, as MPICH has it, without either one
    slot; what follows ``#`` is a comment. A host that is named again has so many more.

    Raises:
        ConfigError: it names none, or not so.
    """
    if not value:
        raise ConfigError("--launcher ssh needs hosts: -o hosts=FILE, or -o hosts=node1,node2:4")
    file = Path(value)
    if file.is_file():
        lines = [(f"{value}:{number}", line) for number, line in enumerate(file.read_text().splitlines(), start=1)]
    elif "/" in value:
        raise ConfigError(f"hosts={value}: there is no such file")
    else:
        lines = [(f"hosts={value}", host) for host in value.split(",")]
    slots: dict[str, int] = {}
    for where, line in lines:
        if text := line.partition("#")[0].strip():
            host = _host(where, text)
            slots[host.name] = slots.get(host.name, 0) + host.slots
    if not slots:
        raise ConfigError(f"hosts={value}: names no host")
    return [Host(name=name, slots=count) for name, count in slots.items()]


def _host(where: str, text: str) -> Host:
    name, *settings = text.split(maxsplit=1)
    matched = _HOST.fullmatch(name)
    rest = _IGNORED.sub("", settings[0] if settings else "").strip()
    slots = _SLOTS.fullmatch(rest)
    count = int(slots[1] if slots else (matched and matched[2]) or 1)
    if not matched or name.startswith("-") or (rest and not slots) or (slots and matched[2]):
        raise ConfigError(f"{where}: {text!r}: expected a host, as in node1, node1:4 or node1 slots=4")
    if not count:
        raise ConfigError(f"{where}: {text!r}: expected at least one slot")
    return Host(name=matched[1].strip("[]"), slots=count)


def taken(hosts: Iterable[Host], workers: int) -> list[Host]:
    """Return those of `hosts` that `workers` need, in their order, each with as many slots as are taken of it.

    Raises:
        LaunchError: there are fewer.
    """
    found, left = [], workers
    hosts = list(hosts)
    for host in hosts:
        if count := min(host.slots, left):
            found.append(Host(name=host.name, slots=count))
            left -= count
    if left:
        there = ", ".join(f"{host.name}:{host.slots}" for host in hosts)
        raise LaunchError(
            f"{workers} workers need as many slots, and the hosts have {workers - left}: {there}; "
            "name more hosts, or more slots of one, as in node1:4"
        )
    return found


def passed_on(environ: Mapping[str, str], names: str) -> dict[str, str]:
    """Return the variables that workers are to have as well: disttrain's own, Python's, BLAS's, and those of `names`.

    Raises:
        ConfigError: one of `names`, which are separated by commas, is not set.
    """
    asked = [name.strip() for name in names.split(",") if name.strip()]
    for name in asked:
        if name not in environ:
            raise ConfigError(f"-o env={names}: {name} is not set here")
    ours = [name for name in env.own(environ) if name not in _NOT_PASSED_ON]
    python = [name for name in environ if name.startswith("PYTHON")]
    blas = [name for name in env.BLAS_THREADS if name in environ]
    return {name: environ[name] for name in dict.fromkeys((*ours, *python, *blas, *asked))}


def mpi_command(job: Job, hosts: Sequence[Host], ssh: Sequence[str], mpi: Mpi) -> Command:
    """Return the command that has `mpi` start the workers on `hosts` by ssh, with this environment and folder.

    Raises:
        LaunchError: it is not MPICH, or cannot pass on an argument.
    """
    if mpi.flavour != "mpich":
        raise LaunchError(
            f"--launcher ssh --transport mpi needs MPICH's mpiexec, and {mpi.mpiexec} is another's: give the hosts to "
            "that, as in: mpirun --hostfile FILE -n 4 python train.py; or leave out --transport, which is then tcp"
        )
    slots = ",".join(f"{host.name}:{host.slots}" for host in hosts)
    program, *words = ssh
    interface = ("-iface", env.interface()) if env.interface() else ()
    line = mpirun.command(job, mpi)
    argv = (line.argv[0], "-launcher", "ssh", "-launcher-exec", program, "-hosts", slots, *interface, *line.argv[1:])
    return Command(argv=argv, env={"HYDRA_LAUNCHER_EXTRA_ARGS": shlex.join(words)})
