"""A launcher whose machine has room for so many workers as the file `room` says; the name of another one follows."""

from pathlib import Path

from disttrain.errors import LaunchError
from launch import local, mpirun
from launch.job import Command, Job


def commands(job: Job) -> list[Command]:
    """Return the commands of the launcher that `room` names.

    Raises:
        LaunchError: there is not enough room.
    """
    room, name = Path("room").read_text().split()
    if job.workers > int(room):
        raise LaunchError(f"there is room for {room} workers, not for {job.workers}")
    return {"local": local, "mpirun": mpirun}[name].commands(job)
