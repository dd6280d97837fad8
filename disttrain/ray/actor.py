"""What runs in Ray's processes: a rank, and on other nodes than this one who passes signals on to ranks."""

import contextlib
import os
import signal
import socket
from collections.abc import Callable
from typing import Any, NamedTuple

from disttrain.errors import DisttrainError, LaunchError
from disttrain.ray.meeting import held_port


class Arrival(NamedTuple):
    """Where a rank is, as it says itself: its process, host, and an address at which it may listen."""

    pid: int
    host: str
    address: str


class Rank:
    """A rank. Its process does nothing else, and it ends with the actor."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def __repr__(self) -> str:
        return f"rank {self._rank}"  # before what it writes, where Ray passes that on

    def arrive(self, folder: str, script: str) -> tuple[int, str, str]:
        """Go to `folder`, and say where this rank is."""
        host = socket.gethostname()
        if folder:
            try:
                os.chdir(folder)
            except OSError as error:
                raise LaunchError(
                    f"rank {self._rank} cannot go to the script's folder {folder}, on host {host}: {error.strerror}; "
                    "it must be there, as on a file system that all nodes share, or by `ray job submit --working-dir`"
                ) from error
        if script and not os.path.isfile(script):
            raise LaunchError(f"rank {self._rank} does not find the script {script} in {os.getcwd()}, on host {host}")
        self._port, meeting = held_port()
        return os.getpid(), host, meeting

    def call(self, environment: dict[str, str], function: Callable[..., Any], *args: Any) -> Any:
        """Call ``function(*args)`` with signals as Python has them, and variables that say this rank's place."""
        os.environ.update(environment)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})  # Ray blocks the first
        try:
            return function(*args)
        except SystemExit as error:  # Ray would take it for the end of the actor, and forget the code
            raise DisttrainError(f"rank {self._rank} has ended by sys.exit({error.code!r})") from error


class Herald:
    """Sends signals to processes of its node: a rank that runs a script takes no calls."""

    def send(self, pid: int, number: int) -> None:
        """Send a signal to a process, which may have ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
