"""`--launcher tests.launch.hosts`: workers of this machine, each as if on a host of its own: they share no memory."""

from disttrain import env
from launch import local
from launch.job import Command, Job


def commands(job: Job) -> list[Command]:
    """Return one command for each worker of `job`."""
    lines = enumerate(local.commands(job))
    return [Command(argv=line.argv, env={**line.env, env.HOST: f"host {rank}"}) for rank, line in lines]
