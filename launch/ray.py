"""`--launcher ray`: workers as actors of Ray, on this machine or on a cluster; no MPI needed.

One process, `launch.actors`, has Ray place the actors, and waits for them.
"""

import dataclasses
import importlib.metadata
import json
import math

from disttrain.errors import ConfigError, LaunchError
from disttrain.ray import PLACEMENTS, Request
from launch.job import Command, Job

OPTIONS = ("address", "cpus", "gpus", "placement")


def commands(job: Job) -> list[Command]:
    """Return the command that has Ray start the workers of `job`.

    Raises:
        ConfigError: an option has a value that it cannot have.
        LaunchError: Ray is not installed, or starts no workers for the transport.
    """
    if not is_installed():
        raise LaunchError(
            "--launcher ray needs Ray, which is not installed: pip install 'disttrain[ray]'; "
            "--launcher local needs none, on this machine"
        )
    if job.transport == "mpi":
        raise LaunchError("workers that Ray has started can have no MPI: leave out --transport, which is then tcp")
    request = json.dumps(dataclasses.asdict(_request(job)))
    return [Command(argv=(job.python, "-P", "-m", "launch.actors", request, job.script, *job.arguments))]


def is_installed() -> bool:
    """Return whether this environment has Ray."""
    try:
        importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _request(job: Job) -> Request:
    """Return what Ray is asked for."""
    placement = job.options.get("placement", Request.placement).upper()
    if placement not in PLACEMENTS:
        raise ConfigError(f"placement={placement}: expected one of {', '.join(PLACEMENTS)}")
    return Request(
        workers=job.workers,
        cpus=_number(job, "cpus", Request.cpus),
        gpus=_number(job, "gpus", Request.gpus),
        placement=placement,
        address=job.options.get("address", ""),
    )


def _number(job: Job, name: str, default: float) -> float:
    text = job.options.get(name, str(default))
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ConfigError(f"{name}={text}: expected how many each worker has, 0 or more")
    return value
