"""Communication among the ranks of a job: `init` joins it, by MPI, or alone, by one call.

`functional` has what can be differentiated.
"""

import importlib
import os
import pkgutil
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from disttrain import env, progress
from disttrain.comm.base import Communicator, Pending, Request
from disttrain.errors import ConfigError, unknown_name
from disttrain.observe import log

if TYPE_CHECKING:
    from disttrain.comm import functional

__all__ = ["Communicator", "Pending", "Request", "connect", "current", "functional", "init", "use"]

_joining = threading.Lock()
_joined: Communicator | None = None
_in_use: ContextVar[Communicator | None] = ContextVar("communicator", default=None)


def __getattr__(name: str) -> Any:
    if name == "functional":  # at its first use: it needs autodiff, and communication does not
        return importlib.import_module(f"{__name__}.functional")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def init(transport: str | None = None) -> Communicator:
    """Join the job, in a script started by anything, and return its communicator.

    A second call returns the same communicator. All ranks call this, as they would a collective.
    The cores are divided among the ranks that share them: the BLAS of each gets its part, unless
    the environment says how many threads it is to use.

    Args:
        transport: as for `connect`; by default what ``DISTTRAIN_TRANSPORT`` says, else MPI under a
            launcher of several processes, else local.

    Raises:
        ConfigError: this process has joined by another transport.
        LaunchError: this process cannot take its place in the job; see `disttrain.comm.mpi`.
    """
    global _joined
    comm = _in_use.get()
    if comm is None:
        with _joining:
            if _joined is None:
                with progress.phase(progress.Phase.JOIN):
                    _joined = connect(transport or env.transport())
                    _divide_cores(_joined)
            comm = _joined
    if transport is not None and transport != comm.transport:
        raise ConfigError(
            f"init({transport!r}): this process has joined by {comm.transport!r} already; name the "
            f"transport in the first call, or leave the job: with use(connect({transport!r}))"
        )
    return comm


def current() -> Communicator:
    """Return the communicator in use here; joins the job when that has not happened yet."""
    return init()


def connect(transport: str) -> Communicator:
    """Return a new communicator.

    Args:
        transport: a module of this package, as in ``"mpi"``, or the dotted path of your own, which
            has a function ``connect() -> Communicator``.

    Raises:
        ConfigError: there is no such transport.
    """
    path = transport if "." in transport else f"{__name__}.{transport}"
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise  # it exists, and lacks something
        raise unknown_name("transport", transport, _transports()) from None
    if not hasattr(module, "connect"):
        raise unknown_name("transport", transport, _transports())
    comm: Communicator = module.connect()
    comm.transport = transport
    return comm


@contextmanager
def use(comm: Communicator) -> Iterator[Communicator]:
    """Make `comm` the current communicator of this thread inside a ``with`` block."""
    token = _in_use.set(comm)
    try:
        yield comm
    finally:
        _in_use.reset(token)


def _transports() -> list[str]:
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    return [name for name in names if hasattr(importlib.import_module(f"{__name__}.{name}"), "connect")]


def _divide_cores(comm: Communicator) -> None:
    """Limit the threads of BLAS to what the job asks for, or to this rank's part of the cores that it may use."""
    cores = os.sched_getaffinity(0)
    # Not the number of local ranks: a launcher may have bound each of them to cores of its own.
    places = comm.all_gather_json([platform.node(), sorted(cores)])
    sharing = sum(node == platform.node() and not cores.isdisjoint(those) for node, those in places)
    asked = env.threads()
    if asked is None and (sharing == 1 or env.has_blas_threads()):
        return
    from threadpoolctl import threadpool_limits

    threads = asked or max(1, len(cores) // sharing)
    threadpool_limits(limits=threads, user_api="blas")
    log.debug("%d ranks share %d cores: BLAS uses %d thread(s)", sharing, len(cores), threads)
