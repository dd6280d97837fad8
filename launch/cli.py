"""The program `disttrain`."""

import importlib
import sys

import click

from disttrain.errors import DisttrainError
from launch.job import Job, as_shell
from launch.supervise import supervise

# The backspace keeps click from joining the lines.
_RUN_EXAMPLES = """\b
Examples:
  disttrain run train.py --epochs 3
  disttrain run -n 4 train.py --epochs 3
  disttrain run -n 2 --launcher local train.py
  disttrain run -n 4 --max-restarts 10 --min-workers 2 train.py
  disttrain run -n 8 --launcher ray --address auto -o gpus=1 train.py
  disttrain run -n 8 --launcher ssh -o hosts=node1:4,node2:4 train.py
  disttrain run -n 8 --launcher slurm --dry-run train.py
"""


class _RefusedError(click.ClickException):
    exit_code = 2  # as for a wrong option: nothing was started


# by name, the module that has it
_IMPORTED_WHEN_ASKED_FOR = {
    "bench": "launch.bench",
    "ckpt": "launch.ckpt",
    "data": "launch.fetch",
    "doctor": "launch.doctor",
    "verify": "launch.verify",
}


class _Commands(click.Group):
    """The commands; one that needs more than the standard library is imported when it is asked for."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Return the names of all commands."""
        return sorted([*super().list_commands(context), *_IMPORTED_WHEN_ASKED_FOR])

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Return the command of a name."""
        if name in _IMPORTED_WHEN_ASKED_FOR:
            command: click.Command = getattr(importlib.import_module(_IMPORTED_WHEN_ASKED_FOR[name]), name)
            return command
        return super().get_command(context, name)


@click.group(cls=_Commands)
@click.version_option(package_name="disttrain", prog_name="disttrain")
def main() -> None:
    """Train on any number of workers, from one command."""


@main.command(context_settings={"allow_interspersed_args": False}, epilog=_RUN_EXAMPLES)
@click.option("-n", "--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Number of workers.")
@click.option(
    "--launcher",
    default="",
    metavar="NAME",
    help="What starts them: mpirun, local (this machine, without MPI), ray, slurm, ssh, or a dotted path. "
    "[default: by -n]",
)
@click.option(
    "--transport",
    default="",
    metavar="NAME",
    help="How they communicate: mpi, shm, tcp, or a dotted path of your own. [default: by --launcher]",
)
@click.option(
    "--hang-timeout",
    type=click.FloatRange(min=0),
    default=Job.hang_timeout_s,
    show_default=True,
    metavar="SECONDS",
    help="End the job when a rank holds up others so long in a step, or 12 to 120 times as long elsewhere; 0: never.",
)
@click.option(
    "--max-restarts",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="K",
    help="Start the job again, at most K times, after a failure; fit() then goes on from its last step.",
)
@click.option(
    "--min-workers",
    type=click.IntRange(min=1),
    metavar="A",
    help="Go on with as few as A if no more can be started. [default: -n]",
)
@click.option("--max-workers", type=click.IntRange(min=1), metavar="B", help="What a restart asks for. [default: -n]")
@click.option("--address", default="", help="The cluster that starts them, for --launcher ray: auto, or HOST:PORT.")
@click.option(
    "-o",
    "--option",
    "options",
    multiple=True,
    metavar="NAME=VALUE",
    help="More for the launcher; for ray: cpus=1, gpus=0 of each worker, placement=PACK or SPREAD; "
    "for ssh: hosts=FILE or a,b:2, ssh=COMMAND, env=NAMES; for slurm: srun=OPTIONS.",
)
@click.option("--dry-run", is_flag=True, help="Print what would be executed, as lines for a shell, and start nothing.")
@click.argument("script", type=click.Path(exists=True, dir_okay=False))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(
    workers: int,
    launcher: str,
    transport: str,
    hang_timeout: float,
    max_restarts: int,
    min_workers: int | None,
    max_workers: int | None,
    address: str,
    options: tuple[str, ...],
    dry_run: bool,
    script: str,
    arguments: tuple[str, ...],
) -> None:
    """Run SCRIPT on one or more workers, and end with its exit code.

    All that follows SCRIPT belongs to it. Each line of output carries the rank that wrote it; when a rank
    fails, all end, and its traceback comes last.
    """
    if not (min_workers or workers) <= workers <= (max_workers or workers):
        raise click.UsageError(f"-n {workers} does not lie between --min-workers and --max-workers")
    job = Job(
        workers=workers,
        script=script,
        arguments=arguments,
        launcher=launcher,
        transport=transport,
        hang_timeout_s=hang_timeout,
        max_restarts=max_restarts,
        min_workers=min_workers or workers,
        max_workers=max_workers or workers,
        options=_named(options) | ({"address": address} if address else {}),
    )
    try:
        if dry_run:
            click.echo(as_shell(job))
            return
        sys.exit(supervise(job))
    except DisttrainError as error:
        raise _RefusedError(str(error)) from error


def _named(options: tuple[str, ...]) -> dict[str, str]:
    """Return the values of options NAME=VALUE."""
    for option in options:
        if "=" not in option:
            raise click.BadParameter(f"{option!r}: expected NAME=VALUE", param_hint="--option")
    return dict(option.split("=", 1) for option in options)
