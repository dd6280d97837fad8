"""A rank that an MPI or srun has started on another host than the supervisor's: it stands in for itself.

It is an outpost (`launch.outpost`) with itself as its one worker, a process that it starts. What it has to tell goes to
`launch.gate`, on the supervisor's host, over a connection by which each proves that it knows the job's secret.
"""

import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from disttrain import env
from disttrain.comm import rendezvous
from disttrain.errors import PREEMPTED, ConfigError, LaunchError
from disttrain.observe import log
from launch import posix
from launch.outpost import HELLO, Outpost, message

_JOIN_S = 10.0  # for the gate to answer, which listens before the ranks start


def run(argv: Sequence[str]) -> None:
    """Run a script as this rank, in a process of its own; return only where the supervisor cannot be reached.

    Signals are the launcher's affair: it sends them to all processes of the rank.
    """
    place, address = env.place(), env.supervisor()
    try:
        job = rendezvous.Pass(secret=rendezvous.secret(), job=watch_of(place.world_size))
        claim = rendezvous.Claim(place.rank, 0, 0)
        deadline_s = time.monotonic() + _JOIN_S
        connection = rendezvous.dial(rendezvous.parsed(address), claim, job, deadline_s, "disttrain run")
    except (OSError, LaunchError, ConfigError) as error:
        log.warning("rank %d is not watched: %s; %s there names another interface", place.rank, error, env.INTERFACE)
        return
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # which the worker inherits
            signal.signal(number, lambda *_: None)
    connection.sendall(message("hello", {**HELLO, "host": socket.gethostname(), "problem": ""}))
    with connection, tempfile.TemporaryDirectory(prefix="disttrain-") as folder:
        posix.remove_after_death(Path(folder))
        descriptors = connection.fileno(), connection.fileno()
        # MPICH's ranks speak with it through an open file.
        options = {"close_fds": False, "preexec_fn": partial(posix.die_with_parent, signal.SIGKILL)}
        code = Outpost(place.world_size, {place.rank: {}}, argv, Path(folder), descriptors, options).run()
    # srun ends all ranks when one has ended badly: of those that were asked to end, and have saved, rank 0 tells.
    sys.exit(0 if code == PREEMPTED and place.rank else code)


def watch_of(workers: int) -> str:
    """Return what tells a connection to the supervisor from those among `workers` ranks, which have the same secret."""
    return f"watch of {workers}"
