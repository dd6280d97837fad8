"""`disttrain bench`: disttrain beside the frameworks that one would use instead.

What is measured, and how, is in the folder `benchmarks` of the repository, which is not installed: it is
looked for beside this package.
"""

import sys
from pathlib import Path

import click

from disttrain.errors import DisttrainError

_ROOT = Path(__file__).resolve().parents[1]

# The backspace keeps click from joining the lines.
_STEP_EXAMPLES = """\b
Examples:
  disttrain bench step                                    all workloads, all systems
  disttrain bench step W1 W2 --systems disttrain,torch    some of them
  disttrain bench step W1 --seconds 1 --json w1.json      shorter, and kept
"""


@click.group()
def bench() -> None:
    """Measure disttrain beside other frameworks."""


@bench.command(epilog=_STEP_EXAMPLES)
@click.argument("workloads", nargs=-1, metavar="[W1 W2 ...]")
@click.option("--systems", default="", metavar="A,B", help="Which to measure, or modules of your own. [default: all]")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=5.0,
    show_default=True,
    help="Of steps of each system on each workload; at least ten steps.",
)
@click.option(
    "--limit",
    type=click.FloatRange(min=0, min_open=True),
    default=600.0,
    show_default=True,
    help="Seconds within which a system is compiled and ready.",
)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Keep the figures there.")
@click.option("--plot", "plot_file", type=click.Path(dir_okay=False, path_type=Path), help="Draw the ratios there.")
def step(
    workloads: tuple[str, ...],
    systems: str,
    seconds: float,
    limit: float,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    """Time a training step of each workload in each system, on one core that they share.

    The systems take turns, so that what slows the machine down slows all of them. A system that is not
    installed is a gap in the table; one that fails, or does not learn, is a gap and makes the exit code 1.
    """
    _find_benchmarks()
    from benchmarks.step import run

    try:
        is_whole = run(
            workloads,
            [name.strip() for name in systems.split(",") if name.strip()],
            seconds=seconds,
            limit_s=limit,
            json_file=json_file,
            plot_file=plot_file,
            say=lambda text: click.echo(text, err=True),
        )
    except DisttrainError as error:
        raise click.ClickException(str(error)) from error
    sys.exit(0 if is_whole else 1)


def _find_benchmarks() -> None:
    """Make the folder `benchmarks` importable, or say where it is."""
    if not (_ROOT / "benchmarks" / "step.py").is_file():
        raise click.ClickException(
            f"the benchmarks belong to disttrain's repository and are not installed: there is no folder "
            f"{_ROOT / 'benchmarks'}. Get the source, run `make env-bench` in it, then `.venv/bin/disttrain bench step`"
        )
    if str(_ROOT) not in sys.path:
        sys.path.insert(0, str(_ROOT))
