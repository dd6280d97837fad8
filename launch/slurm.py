"""`--launcher slurm`: workers of a Slurm allocation, by srun; ranks meet over TCP, unless the transport is `mpi`."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from disttrain import env
from disttrain.errors import LaunchError
from launch.job import Command, Job, across_hosts

OPTIONS = ("srun",)

_PORTS = range(20000, 30000)  # below those that systems give out
_TIMEOUT_S = 10


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """What Slurm has given to the job.

    Attributes:
        nodes: how many.
        address: of the first node, where rank 0 will be.
        tasks: how many; 0 where nobody asked for a number.
        cpus: of each task; 0 likewise.
    """

    nodes: int
    address: str
    tasks: int = 0
    cpus: int = 0


def commands(job: Job) -> list[Command]:
    """Return the command that starts the workers of `job` in the allocation that this process is in.

    Raises:
        LaunchError: it is in none, or Slurm does not tell where the allocation is.
    """
    return [command(job, allocation(os.environ), secrets.choice(_PORTS), secrets.token_hex(), os.environ)]


def command(job: Job, there: Allocation, port: int, secret: str, environ: Mapping[str, str]) -> Command:
    """Return the command that starts `job`, whose ranks meet at `port`, if by TCP, and know each other by `secret`.

    srun that is sent SIGTERM kills its tasks. Slurm sends them theirs by itself, so srun does not hear it, and is sent
    SIGUSR1 by the supervisor, which it passes on.

    Raises:
        LaunchError: there are fewer tasks than workers, or ranks of the transport could not meet.
    """
    own = job.words("srun")
    if 0 < there.tasks < job.workers and not {"--overcommit", "-O"} & set(own):
        raise LaunchError(
            f"the allocation has {there.tasks} task(s), and {job.workers} workers are asked for: sbatch --ntasks "
            f"{job.workers}, or -o srun=--overcommit"
        )
    if job.transport == "shm" and there.nodes > 1:
        raise LaunchError("workers of several nodes share no memory: leave out --transport, which is then tcp")
    options = ["--ntasks", str(job.workers), "--label", "--kill-on-bad-exit=1", "--export=ALL"]
    if there.cpus:
        options.append(f"--cpus-per-task={there.cpus}")  # since Slurm 22.05 srun does not know by itself
    settings = {}
    if job.workers > 1 and job.transport != "mpi":
        options.append("--mpi=none")
        settings[env.TRANSPORT] = job.transport or "tcp"
        if not env.rendezvous(environ):
            settings[env.RENDEZVOUS] = f"{there.address}:{port}"
        if not (env.secret(environ) or env.secret_file(environ)):
            settings[env.SECRET] = secret
    argv = ("env", "--ignore-signal=TERM", "srun", *options, *own, *job.worker)
    line = Command(argv=argv, env=settings, asked=signal.SIGUSR1)
    is_across = job.workers > 1 and there.nodes > 1
    return across_hosts(job, line, there.address, secret, environ) if is_across else line


def allocation(environ: Mapping[str, str]) -> Allocation:
    """Return the allocation that `environ` tells of.

    Raises:
        LaunchError: it tells of none, there is no Slurm here, or Slurm does not know the first node.
    """
    nodes = env.slurm_nodes(environ)
    if not nodes:
        raise LaunchError(
            f"--launcher slurm starts workers inside an allocation, and {env.SLURM_NODES} is not set: call it from a "
            "script for sbatch, such as cluster/slurm/train.sbatch, or after salloc"
        )
    if shutil.which("srun") is None:
        raise LaunchError("--launcher slurm needs srun, which is not on PATH")
    names = _scontrol("show", "hostnames", nodes).split()
    facts = dict(word.partition("=")[::2] for word in _scontrol("show", "node", "--oneliner", names[0]).split())
    address = facts.get("NodeAddr", names[0])
    if len(names) > 1 and _is_loopback(address) and not env.rendezvous(environ):
        raise LaunchError(
            f"node {names[0]} calls itself {address}, which means loopback here, where other nodes do not reach it: "
            f"mend its /etc/hosts, or say where rank 0 is to listen: {env.RENDEZVOUS}=host:port"
        )
    tasks, cpus = env.slurm_tasks(environ)
    return Allocation(nodes=len(names), address=address, tasks=tasks, cpus=cpus)


def _scontrol(*words: str) -> str:
    try:
        done = subprocess.run(
            ("scontrol", *words),  # noqa: S607 - whichever is on the path
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LaunchError(f"Slurm does not say where the allocation is: {error}") from error
    if done.returncode:
        raise LaunchError(f"Slurm does not say where the allocation is: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _is_loopback(address: str) -> bool:
    try:
        return socket.gethostbyname(address).startswith("127.")
    except OSError:
        return False  # the ranks will say
