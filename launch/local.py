"""`--launcher local`: workers on this machine, no MPI needed; they communicate through shared memory."""

from disttrain import env
from launch.job import Command, Job


def commands(job: Job) -> list[Command]:
    """Return the commands that start the workers of `job`, one each."""
    if job.workers == 1:
        return [Command(argv=job.worker)]
    size = str(job.workers)
    sizes = {env.WORLD_SIZE: size, env.LOCAL_SIZE: size}
    return [
        Command(argv=job.worker, env={env.RANK: str(rank), env.LOCAL_RANK: str(rank), **sizes})
        for rank in range(job.workers)
    ]
