"""`--launcher tests.launch.away`: two workers of this machine, of which rank 1 is as if on another host.

It does not see the job's folder, and comes to the supervisor over the network, which is that of this host alone.
"""

import secrets
import socket

from disttrain import env
from launch import local
from launch.job import Command, Job, across_hosts

OPTIONS = ("secret",)  # of rank 1, instead of the job's


def commands(job: Job) -> list[Command]:
    """Return the command of rank 0, and what hears of rank 1."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    settings = {env.TRANSPORT: "tcp", env.RENDEZVOUS: f"127.0.0.1:{port}", env.INTERFACE: "lo"}
    settings |= {env.SECRET: secrets.token_hex()}
    near, far = (Command(argv=line.argv, env={**line.env, **settings}) for line in local.commands(job))
    own = [f"{env.SECRET}={job.options['secret']}"] if "secret" in job.options else []
    line = Command(argv=("env", "-u", env.JOB_DIR, *own, *far.argv), env=far.env)
    return [near, across_hosts(job, line, "", "", settings)]
