"""The rank's place in the job: the only reader of environment variables of launchers and schedulers."""

import functools
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from disttrain.errors import ConfigError

TRANSPORT = "DISTTRAIN_TRANSPORT"
JOB_DIR = "DISTTRAIN_JOB_DIR"
LAST_STEP = "DISTTRAIN_LAST_STEP"
MIN_WORKERS = "DISTTRAIN_MIN_WORKERS"
RANK = "DISTTRAIN_RANK"
WORLD_SIZE = "DISTTRAIN_WORLD_SIZE"
LOCAL_RANK = "DISTTRAIN_LOCAL_RANK"
LOCAL_SIZE = "DISTTRAIN_LOCAL_SIZE"
BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
DATA_DIR = "DISTTRAIN_DATA"
KERNELS = "DISTTRAIN_KERNELS"
THREADS = "DISTTRAIN_THREADS"
SLURM_NODES = "SLURM_JOB_NODELIST"
SLURM_END = "SLURM_JOB_END_TIME"
MATMUL_PRECISION = "DISTTRAIN_MATMUL_PRECISION"
VERIFY = "DISTTRAIN_VERIFY"
LEDGER_KEY_FILE = "DISTTRAIN_LEDGER_KEY_FILE"
HOST = "DISTTRAIN_HOST"
RENDEZVOUS = "DISTTRAIN_RENDEZVOUS"
SECRET = "DISTTRAIN_SECRET"  # noqa: S105 - the name of it
SECRET_FILE = "DISTTRAIN_SECRET_FILE"  # noqa: S105
INTERFACE = "DISTTRAIN_INTERFACE"
SUPERVISOR = "DISTTRAIN_SUPERVISOR"
RAY_ADDRESS = "RAY_ADDRESS"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a process stands in its job, as its launcher says.

    Attributes:
        launcher: who started the process, in words, with the variable that says so; empty when
            no launcher did.
        rank: from 0 to ``world_size - 1``.
        world_size: number of processes in the job.
        local_rank: rank among the processes on this host.
        local_size: number of the job's processes on this host.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_size: int


@dataclass(frozen=True, kw_only=True)
class _Scheduler:
    """The names under which a launcher tells a process its place."""

    name: str
    rank: str
    world_size: str
    local_rank: str
    local_size: str
    node: str = ""


_OWN = _Scheduler(
    name="disttrain's launcher",
    rank=RANK,
    world_size=WORLD_SIZE,
    local_rank=LOCAL_RANK,
    local_size=LOCAL_SIZE,
)
# Our own first: it may run within the allocation of another. MPICH's mpiexec, and those derived from it, speak PMI.
# Under Slurm, only a process that srun started has SLURM_STEP_NUM_TASKS: a batch script has SLURM_NTASKS, and is alone
# nevertheless.
_SCHEDULERS = (
    _OWN,
    _Scheduler(
        name="Open MPI's mpirun",
        rank="OMPI_COMM_WORLD_RANK",
        world_size="OMPI_COMM_WORLD_SIZE",
        local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
        local_size="OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    _Scheduler(
        name="MPICH's mpiexec",
        rank="PMI_RANK",
        world_size="PMI_SIZE",
        local_rank="MPI_LOCALRANKID",
        local_size="MPI_LOCALNRANKS",
    ),
    _Scheduler(
        name="Slurm's srun",
        rank="SLURM_PROCID",
        world_size="SLURM_STEP_NUM_TASKS",
        local_rank="SLURM_LOCALID",
        local_size="SLURM_STEP_TASKS_PER_NODE",
        node="SLURM_NODEID",
    ),
)


def place(environ: Mapping[str, str] = os.environ) -> Place:
    """Return this process's place in its job: rank 0 of 1 when no launcher started it."""
    for scheduler in _SCHEDULERS:
        size = environ.get(scheduler.world_size, "")
        if not size.isdigit():
            continue
        return Place(
            launcher=f"{scheduler.name} ({scheduler.world_size}={size})",
            rank=_number(environ.get(scheduler.rank), 0),
            world_size=int(size),
            local_rank=_number(environ.get(scheduler.local_rank), 0),
            local_size=_count(environ.get(scheduler.local_size), _number(environ.get(scheduler.node), 0)),
        )
    return Place(launcher="", rank=0, world_size=1, local_rank=0, local_size=1)


def transport(environ: Mapping[str, str] = os.environ) -> str:
    """Return the transport that the job asks for: ``DISTTRAIN_TRANSPORT``, else by the launcher."""
    here = place(environ)
    by_launcher = "local" if here.world_size == 1 else "shm" if here.launcher.startswith(_OWN.name) else "mpi"
    return environ.get(TRANSPORT) or by_launcher


def host(environ: Mapping[str, str] = os.environ) -> str:
    """Return what tells this host from others: ``DISTTRAIN_HOST``, else its start and its name.

    Containers on one machine are hosts of their own where they have names of their own.
    """
    return environ.get(HOST) or f"{_boot_id()} {platform.node()}"


def rendezvous(environ: Mapping[str, str] = os.environ) -> str:
    """Return the ``host:port`` at which rank 0 listens for the others, as ``DISTTRAIN_RENDEZVOUS`` says; else empty."""
    return environ.get(RENDEZVOUS, "")


def secret(environ: Mapping[str, str] = os.environ) -> str:
    """Return the job's secret in ``DISTTRAIN_SECRET``; empty where it is not set."""
    return environ.get(SECRET, "")


def secret_file(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Return the file that ``DISTTRAIN_SECRET_FILE`` names, in which the job's secret is; None where it is not set."""
    return Path(environ[SECRET_FILE]) if environ.get(SECRET_FILE) else None


def interface(environ: Mapping[str, str] = os.environ) -> str:
    """Return the network interface, or its address, that ``DISTTRAIN_INTERFACE`` asks for; empty: the job's."""
    return environ.get(INTERFACE, "")


def supervisor(environ: Mapping[str, str] = os.environ) -> str:
    """Return the ``host:port`` at which `disttrain run` hears of ranks on other hosts; empty where it does not."""
    return environ.get(SUPERVISOR, "")


def ray_address(environ: Mapping[str, str] = os.environ) -> str:
    """Return the address of the Ray cluster that ``RAY_ADDRESS`` names, as under `ray job submit`; else empty."""
    return environ.get(RAY_ADDRESS, "")


def slurm_nodes(environ: Mapping[str, str] = os.environ) -> str:
    """Return the nodes of the Slurm allocation that this process is in, as ``node[1-3]``; empty where it is in none."""
    return environ.get(SLURM_NODES, "")


def slurm_tasks(environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return for how many tasks Slurm was asked, and for how many CPUs for each; 0 where it was not."""
    return _number(environ.get("SLURM_NTASKS"), 0), _number(environ.get("SLURM_CPUS_PER_TASK"), 0)


def names_hosts(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether an MPI's launcher finds hosts in the environment: a host file, or a scheduler's allocation."""
    return any(environ.get(name) for name in _HOSTS) or _number(environ.get("SLURM_JOB_NUM_NODES"), 1) > 1


def ssh_address(environ: Mapping[str, str] = os.environ) -> str:
    """Return the address at which ssh has reached this host; empty where nobody has."""
    connection = environ.get("SSH_CONNECTION", "").split()
    return connection[2] if len(connection) == 4 else ""


def own(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that disttrain reads and a user sets: what workers started elsewhere are to have as well."""
    by_launcher = (JOB_DIR, SUPERVISOR, RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE)
    return {name: value for name, value in environ.items() if name.startswith("DISTTRAIN_") and name not in by_launcher}


def job_dir(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Return the job's private folder, which `disttrain run` has made; None where something else started this."""
    return Path(environ[JOB_DIR]) if environ.get(JOB_DIR) else None


def last_step(environ: Mapping[str, str] = os.environ) -> str:
    """Return where the supervisor of a job that may be started again keeps its last step; empty: nowhere."""
    pid, address = _withheld
    return environ.get(LAST_STEP, "") or (address if pid == os.getpid() else "")


def withhold_last_step() -> None:
    """Keep from the programs that this process starts where the last step is: a `fit` there would take it for its own.

    A child that is forked does not know either.
    """
    global _withheld
    _withheld = os.getpid(), os.environ.pop(LAST_STEP, "")


def min_workers(environ: Mapping[str, str] = os.environ) -> int:
    """Return with how few ranks the job may go on, as ``DISTTRAIN_MIN_WORKERS`` says; else 1."""
    return max(_number(environ.get(MIN_WORKERS), 1), 1)


def data_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Return where fetched data sets are kept: ``DISTTRAIN_DATA``, else a folder in the user's cache."""
    chosen = environ.get(DATA_DIR) or platformdirs.user_cache_path("disttrain") / "datasets"
    return Path(chosen).absolute()


def costs_dir() -> Path:
    """Return where measured costs of messages are kept: a folder in the user's cache."""
    return Path(platformdirs.user_cache_path("disttrain")) / "costs"


def kernels(environ: Mapping[str, str] = os.environ) -> str:
    """Return which kernels ``DISTTRAIN_KERNELS`` asks for; empty: the best that there are."""
    return environ.get(KERNELS, "")


def threads(environ: Mapping[str, str] = os.environ) -> int | None:
    """Return how many threads ``DISTTRAIN_THREADS`` gives a worker; None where it is not set.

    Raises:
        ConfigError: it is not a whole number of at least 1.
    """
    asked = environ.get(THREADS, "")
    if asked and not (asked.isdecimal() and int(asked) >= 1):
        raise ConfigError(f"{THREADS}={asked}: expected the number of threads of a worker, 1 or more")
    return int(asked) if asked else None


def matmul_precision(environ: Mapping[str, str] = os.environ) -> str:
    """Return how exactly ``DISTTRAIN_MATMUL_PRECISION`` asks matrices to be multiplied; empty: it does not."""
    return environ.get(MATMUL_PRECISION, "")


def end_s(environ: Mapping[str, str] = os.environ) -> float | None:
    """Return when the scheduler will end the job, in seconds since 1970; None where it does not say.

    Slurm gives it to every process of a job with a time limit.
    """
    text = environ.get(SLURM_END, "")
    return float(text) if text.isdecimal() else None


def verify(environ: Mapping[str, str] = os.environ) -> tuple[int, Path] | None:
    """Return how many steps `disttrain verify` is to see, and where its notes go; None where it did not start this."""
    steps, _, folder = environ.get(VERIFY, "").partition(":")
    return (int(steps), Path(folder)) if steps else None


def ledger_key(environ: Mapping[str, str] = os.environ) -> bytes:
    """Return the key of ledgers, from the file that ``DISTTRAIN_LEDGER_KEY_FILE`` names; empty where it is not set.

    Raises:
        ConfigError: the file cannot be read, or is empty.
    """
    path = environ.get(LEDGER_KEY_FILE)
    if not path:
        return b""
    try:
        key = Path(path).read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"{LEDGER_KEY_FILE}={path}: cannot be read: {error.strerror}") from error
    if not key:
        raise ConfigError(f"{LEDGER_KEY_FILE}={path}: the file is empty, expected a key")
    return key


def has_blas_threads(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether the environment says how many threads BLAS is to use."""
    return any(environ.get(name) for name in BLAS_THREADS)


# Of MPICH, Intel MPI and Open MPI, which the MPI Operator of Kubernetes sets as well; of PBS, LSF and Grid Engine.
_HOSTS = (
    "HYDRA_HOST_FILE", "I_MPI_HYDRA_HOST_FILE", "OMPI_MCA_orte_default_hostfile", "PRTE_MCA_prte_default_hostfile",
    "PBS_NODEFILE", "LSB_DJOB_HOSTFILE", "PE_HOSTFILE",
)  # fmt: skip
_withheld = 0, ""  # the pid of the process that has the address of the last step, and that


@functools.cache
def _boot_id() -> str:
    """Return what the kernel has called this start of the machine; empty where it says nothing."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _number(text: str | None, default: int) -> int:
    return int(text) if text and text.isdigit() else default


def _count(text: str | None, node: int) -> int:
    """Return the number that `text` has for `node`: ``2(x3),1`` is two on three nodes, then one."""
    counts: list[str] = []
    for part in (text or "").split(","):
        count, _, times = part.partition("(x")
        counts += [count] * _number(times.rstrip(")"), 1)
    return _number(counts[min(node, len(counts) - 1)], 1)
