"""`--launcher local`: one worker on this machine, no MPI needed."""

from disttrain.errors import LaunchError
from launch.job import Command, Job


def commands(job: Job) -> list[Command]:
    """Return the command that starts the one worker of `job`."""
    if job.workers > 1:
        raise LaunchError(
            f"--launcher local starts one worker, -n {job.workers} asks for more; --launcher mpirun starts any number"
        )
    return [Command(argv=job.worker)]
