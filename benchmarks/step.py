"""What `disttrain bench step` does: workloads by systems, shown as a table and kept as JSON and as a plot."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import figures, machine, show, systems, workloads
from benchmarks.measure import measure
from disttrain.errors import ConfigError


def run(
    workload_names: Sequence[str],
    system_names: Sequence[str],
    *,
    seconds: float,
    limit_s: float,
    json_file: Path | None,
    plot_file: Path | None,
    say: Callable[[str], None],
) -> bool:
    """Measure, show and keep; return whether nothing failed. What is merely absent is no failure.

    Args:
        workload_names: none for all.
        system_names: none for all.
        seconds: of steps of each system on each workload.
        limit_s: within which a system is ready.
        json_file: where to keep the figures.
        plot_file: where to draw the ratios.
        say: is told what goes on.

    Raises:
        ConfigError: an unknown name, or a file that could not be written afterwards.
    """
    chosen = [workloads.get(name) for name in workload_names or workloads.names()]
    asked = list(dict.fromkeys(system_names or systems.names()))
    for name in asked:
        systems.module_name(name)  # an unknown one is an error before minutes of measuring
    for file in filter(None, (json_file, plot_file)):
        if not file.resolve().parent.is_dir():
            raise ConfigError(f"{file} cannot be written: there is no folder {file.parent}")
    if plot_file and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("a plot needs matplotlib, which is not installed; make env-bench adds it")

    place = machine.describe()
    console = Console()
    console.print(machine.in_words(place), highlight=False, soft_wrap=True)
    samples = []
    for workload in chosen:
        samples += measure(workload, asked, seconds=seconds, limit_s=limit_s, say=say)
        rows = figures.rows(samples)
        if json_file:  # after each workload: an interrupted run keeps what it has
            json_file.write_text(json.dumps({"machine": place, "seconds": seconds, "rows": rows}, indent=1) + "\n")
    console.print(show.table(rows))
    for gap in show.gaps(rows):
        console.print(gap, soft_wrap=True)
    if plot_file:
        show.plot(rows, plot_file)
    return not any(sample.is_failure for sample in samples)
