"""What `disttrain bench TASK` does: workloads by systems, shown as a table and kept as JSON and as a plot."""

import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import figures, machine, show, systems, tasks, workloads
from benchmarks.measure import measure
from disttrain.errors import ConfigError

ALL = "all"  # in the place of systems
FILE_WIDTH = 140  # of what is not shown on a terminal


def run(
    task_name: str,
    workload_names: Sequence[str],
    system_names: Sequence[str],
    *,
    json_file: Path | None,
    plot_file: Path | None,
    say: Callable[[str], None],
    workers: Sequence[int] = (1,),
    **how: Any,
) -> bool:
    """Measure, show and keep; return whether nothing failed. What is merely absent is no failure.

    Args:
        task_name: what to measure.
        workload_names: none for all of the task.
        system_names: none for those of the task; "all" for these and every form of disttrain.
        json_file: where to keep the figures.
        plot_file: where to draw the ratios.
        say: is told what goes on.
        workers: numbers of processes that train together.
        how: what `measure` takes beside that.

    Raises:
        ConfigError: an unknown name, a file that could not be written afterwards, more workers than cores.
        DisttrainError: the task cannot be measured here.
    """
    task = tasks.get(task_name)
    chosen = [workloads.get(name) for name in workload_names or task.workloads]
    for workload in chosen:
        if workload.name not in task.workloads:
            raise ConfigError(f"{task.name} is measured on {', '.join(task.workloads)}, not on {workload.name}")
    asked: list[str] = []
    for name in system_names or task.systems:
        asked += (*task.systems, *systems.forms()) if name == ALL else (name,)
    asked = list(dict.fromkeys(asked))
    for name in asked:  # an unknown one is an error before minutes of measuring
        systems.module_name(name)
        systems.environment(name)
    for file in filter(None, (json_file, plot_file)):
        if not file.resolve().parent.is_dir():
            raise ConfigError(f"{file} cannot be written: there is no folder {file.parent}")
    if plot_file and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("a plot needs matplotlib, which is not installed; make env-bench adds it")
    task.check()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if max(workers) > cores:
        raise ConfigError(f"{max(workers)} workers need a core each; this process may use {cores}")

    place = machine.describe()
    console = Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    console.print(machine.in_words(place), highlight=False, soft_wrap=True)
    samples = []
    for workload in chosen:
        samples += measure(task, workload, asked, say=say, workers=workers, **how)
        rows = figures.rows(task, samples)
        if json_file:  # after each workload: an interrupted run keeps what it has
            kept = {"task": task.name, "machine": place, "asked": how, "rows": rows}
            json_file.write_text(json.dumps(kept, indent=1) + "\n")
    console.print(show.table(task, rows))
    for gap in show.gaps(rows):
        console.print(gap, soft_wrap=True)
    if plot_file:
        show.plot(task, rows, plot_file)
    return not any(sample.is_failure for sample in samples)
