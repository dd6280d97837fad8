"""Tasks: one a file, whose name is the task's and its command's: `disttrain bench NAME`.

A task says what is measured, which the program reads, and how, which runs in a worker.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from benchmarks.workloads import Workload
from disttrain.errors import unknown_name

# What the parent is told first, and what is called for each slice: seconds -> {"values": [...], ...}.
Prepared: TypeAlias = tuple[dict[str, Any], Callable[[float], dict[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What a worker is to measure.

    Attributes:
        module: of the system.
        workload: the model and its batch.
        workers: number of processes that train together.
        started_s: when the worker was started, by `time.monotonic`.
    """

    module: str
    workload: Workload
    workers: int
    started_s: float


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is measured; less is always better.

    Attributes:
        name: of the command.
        title: of table and plot.
        prepare: gets a worker ready to be asked for slices.
        unit: of the values in figures.
        scale: from what workers measure, seconds or bytes, to `unit`.
        systems: those that are measured where none is named.
        workloads: those that can be measured.
        rounds: number of slices of each system, which take turns.
        is_fresh: whether each slice has a process of its own; else a process takes all of a system's.
        columns: heading in the table by key of the row, for what this task shows beside the rest.
        ratio: key of the ratio that the table and the plot show.
        check: raises a `DisttrainError` where the task cannot be measured here.
    """

    name: str
    title: str
    prepare: Callable[[Assignment], Prepared]
    unit: str = "ms"
    scale: float = 1e3
    systems: tuple[str, ...] = ("disttrain", "torch")
    workloads: tuple[str, ...] = ("W1", "W2", "W3", "W4", "W5")
    rounds: int = 10
    is_fresh: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)
    ratio: str = "ratio_to_best_peer"
    check: Callable[[], None] = lambda: None


def names() -> list[str]:
    """Return the names of all tasks."""
    return [module.name for module in pkgutil.iter_modules(__path__)]


def get(name: str) -> Task:
    """Return the task of a name.

    Raises:
        ConfigError: there is none; the message names the nearest.
    """
    if name not in names():
        raise unknown_name("task", name, names())
    task = importlib.import_module(f"{__name__}.{name}").TASK
    assert isinstance(task, Task)
    return task
