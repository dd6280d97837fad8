"""`disttrain bench`: disttrain beside the frameworks that one would use instead.

What is measured, and how, is in the folder `benchmarks` of the repository, which is not installed: it is
looked for beside this package.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from disttrain.errors import DisttrainError
from launch.job import Job
from launch.supervise import supervise

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
@click.option("--workers", type=click.IntRange(min=2), default=2, show_default=True, help="From one to that many.")
def scaling() -> None:
    """Compare the samples per second of several workers, a core and a batch each, with those of one.

    Beside them torch's DistributedDataParallel, over gloo, with the same batch for each worker. Of disttrain's steps
    also the shares of computing, of communication that nothing hides, of waiting for other ranks, and of data.
    """


@_task(
    "disttrain bench scaling_strong W2 --workers 4",
    seconds=10.0,
)
@click.option("--workers", type=click.IntRange(min=2), default=2, show_default=True, help="From one to that many.")
def scaling_strong() -> None:
    """Compare the samples per second of several workers, a core each and parts of one batch, with those of one.

    As `scaling`, which gives each worker a batch.
    """


@bench.command(
    epilog="""\b
Examples:
  disttrain bench allreduce
  disttrain bench allreduce -n 4 --sizes 4K,1M,100M --json allreduce.json
"""
)
@click.option("-n", "--workers", type=click.IntRange(min=2), default=2, show_default=True, help="Number of ranks.")
@click.option("--sizes", default="4K,64K,1M,4M,16M,100M", show_default=True, help="Of arrays, in bytes, KiB or MiB.")
@click.option("--rounds", type=click.IntRange(min=1), default=10, show_default=True, help="In which all take turns.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Keep the figures there.")
def allreduce(workers: int, sizes: str, rounds: int, json_file: Path | None) -> None:
    """Time sums over ranks of this machine, in the columns of nccl-tests.

    disttrain's own, with arrays in its windows and elsewhere, by messages over MPI and TCP, between two hosts that are
    one machine, MPI_Allreduce, gloo where torch is installed, a copy, and a pass in place, which is the ceiling. They
    take turns in one job under mpiexec.
    """
    _find_benchmarks()
    file = str(json_file.absolute()) if json_file else ""
    arguments = (str(rounds), file, *(str(_bytes(size)) for size in sizes.split(",")))
    script = str(_ROOT / "benchmarks" / "allreduce.py")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    try:
        sys.exit(supervise(Job(workers=workers, script=script, arguments=arguments, launcher="mpirun")))
    except DisttrainError as error:
        raise click.ClickException(str(error)) from error


def _bytes(size: str) -> int:
    """Return the number of bytes that ``4K``, ``1M`` or ``4096`` means: a multiple of 4."""
    text = size.strip().upper()
    factor = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
    number = text[:-1] if factor > 1 else text
    if not number.isdecimal() or int(number) * factor < 4 or int(number) * factor % 4:
        raise click.BadParameter(f"{size!r} is no size of an array of float32: 4096, 4K or 1M is", param_hint="--sizes")
    return int(number) * factor


def _run(
    name: str, workloads: tuple[str, ...], systems: str, json_file: Path | None, plot_file: Path | None, **how: Any
) -> None:
    """Measure, and end with an exit code that is 0 only where nothing failed."""
    _find_benchmarks()
    from benchmarks.program import run

    if "workers" in how:
        how["workers"] = tuple(range(1, how["workers"] + 1))
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
