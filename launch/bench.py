"""`disttrain bench`: disttrain beside the frameworks that one would use instead.

What is measured, and how, is in the folder `benchmarks` of the repository, which is not installed: it is
looked for beside this package.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from disttrain.errors import DisttrainError

_ROOT = Path(__file__).resolve().parents[1]


@click.group()
def bench() -> None:
    """Measure disttrain beside other frameworks.

    Systems take turns on the same core, so that what slows the machine down slows all of them. One that is not
    installed is a gap in the table; one that fails, or does not learn, is a gap and makes the exit code 1.
    `disttrain:FORM` is disttrain in a precision (high, medium), with the kernels of an instruction set
    (avx512, avx2, portable, numpy), or both, as `disttrain:high:avx2`.
    """


def _task(*examples: str, seconds: float | None = None) -> Callable[[Callable[..., None]], click.Command]:
    """Return a decorator that makes a command of a function whose name is the task's, and whose docstring its help.

    The function's own options become arguments of the measuring. `examples` are command lines with what they do;
    `seconds` is the default of an option of that name, None for no such option.
    """

    def command(function: Callable[..., None]) -> click.Command:
        name = function.__name__

        def call(
            workloads: tuple[str, ...], systems: str, json_file: Path | None, plot_file: Path | None, **how: Any
        ) -> None:
            how = {"seconds": 0.0, **how}
            _run(name, workloads, systems, json_file, plot_file, **how)

        call.__doc__ = function.__doc__
        vars(call).update(vars(function))  # click keeps a function's options there
        path = click.Path(dir_okay=False, path_type=Path)
        above_0 = click.FloatRange(min=0, min_open=True)
        options = [
            click.argument("workloads", nargs=-1, metavar="[W1 W2 ...]"),
            click.option(
                "--systems",
                default="",
                metavar="A,B",
                help="Which to measure; all: every form of disttrain as well; or modules of your own.",
            ),
            click.option("--json", "json_file", type=path, help="Keep the figures there."),
            click.option("--plot", "plot_file", type=path, help="Draw the ratios there."),
            click.option(
                "--limit",
                "limit_s",
                type=above_0,
                default=600.0,
                show_default=True,
                help="Seconds within which a system is compiled and ready.",
            ),
        ]
        if seconds is not None:
            text = "Of measuring each system on each workload, and more where each round takes longer."
            options.append(click.option("--seconds", type=above_0, default=seconds, show_default=True, help=text))
        for option in reversed(options):
            call = option(call)
        # The backspace keeps click from joining the lines.
        return bench.command(name, epilog="\n".join(["\b", "Examples:", *(f"  {each}" for each in examples)]))(call)

    return command


@_task(
    "disttrain bench step                                    all workloads, disttrain and its peers",
    "disttrain bench step W1 W2 --systems disttrain,torch    some of them",
    "disttrain bench step --systems all --json step.json     each precision and fallback as well, and kept",
    seconds=5.0,
)
def step() -> None:
    """Time a training step of each workload in each system, on one core that they share."""


@_task(
    "disttrain bench predict                                 all workloads",
    "disttrain bench predict W3 --seconds 2 --plot w3.png    shorter, and drawn",
    seconds=5.0,
)
def predict() -> None:
    """Time `predict` on four batches of each workload in each system, on one core that they share."""


@_task(
    "disttrain bench epoch                  on the models of W1, W2 and W3",
    "disttrain bench epoch W1 --epochs 9    more of them",
)
@click.option(
    "--epochs",
    "rounds",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="That are timed, after one that is not.",
)
def epoch() -> None:
    """Time whole epochs of Fashion-MNIST by `fit`, with the test accuracy that they lead to.

    torch, JAX and TensorFlow do it in their best simple loop: shuffled row numbers, rows of an array in memory.
    `disttrain data fashion_mnist` brings the data.
    """


@_task(
    "disttrain bench memory                            all workloads, disttrain and torch",
    "disttrain bench memory W4 --systems disttrain,jax",
)
def memory() -> None:
    """Measure the peak resident memory of a process that trains, and how far it is above all that is imported."""


@_task(
    "disttrain bench start W1",
    "disttrain bench start --starts 9 --json start.json",
)
@click.option(
    "--starts", "rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Of each system's processes."
)
def start() -> None:
    """Time a process from its start to the end of its first training step, and the parts of that.

    Kernels are loaded from disttrain's cache; the first of all runs also compiles them.
    """


@_task(
    "disttrain bench scaling",
    "disttrain bench scaling W2 W4 --workers 2 --seconds 30",
    seconds=10.0,
)
@click.option("--workers", type=click.IntRange(min=2), default=2, show_default=True, help="Beside one worker.")
def scaling() -> None:
    """Compare the samples per second of several workers, a core and a batch each, with those of one."""


def _run(
    name: str, workloads: tuple[str, ...], systems: str, json_file: Path | None, plot_file: Path | None, **how: Any
) -> None:
    """Measure, and end with an exit code that is 0 only where nothing failed."""
    _find_benchmarks()
    from benchmarks.program import run

    if "workers" in how:
        how["workers"] = (1, how["workers"])
    try:
        is_whole = run(
            name,
            workloads,
            [each.strip() for each in systems.split(",") if each.strip()],
            json_file=json_file,
            plot_file=plot_file,
            say=lambda text: click.echo(text, err=True),
            **how,
        )
    except DisttrainError as error:
        raise click.ClickException(str(error)) from error
    sys.exit(0 if is_whole else 1)


def _find_benchmarks() -> None:
    """Make the folder `benchmarks` importable, or say where it is."""
    if not (_ROOT / "benchmarks" / "program.py").is_file():
        raise click.ClickException(
            f"the benchmarks belong to disttrain's repository and are not installed: there is no folder "
            f"{_ROOT / 'benchmarks'}. Get the source, run `make env-bench` in it, then `.venv/bin/disttrain bench step`"
        )
    if str(_ROOT) not in sys.path:
        sys.path.insert(0, str(_ROOT))
