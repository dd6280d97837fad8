"""Systems: one a file, whose name is the system's; a dotted path to a module of your own works as well.

Such a module has

- ``PACKAGES``: the distributions whose versions are recorded, the first one's beside each figure;
- ``PRECISION``: of products, as ``"float32"``;
- ``variants(workload, task)``: names of the settings among which the fastest is kept; where a task has no trial
  it takes the last;
- ``build(workload, variant) -> Built``;
- ``product(a, b)``: the matrix product of two float32 arrays by what the model uses, as an array;
- where it has something to load beside its modules, ``load()``;
- where it trains in parallel, ``agreed(number) -> int``: rank 0's number, on all ranks; and, where it can be told,
  ``shares(step, count)``: what parts of the time of so many steps are "compute", "communication", "waiting", "data".

It imports its framework at the top: where that is not installed, the system is a gap. One whose name begins
with ``disttrain`` is ours, any other is a peer. Ours has forms, as ``disttrain:high:avx2``: what stands after a
colon is a precision of products, or the kernels to use, and sets a variable in the worker's environment.
"""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.architecture import Array
from disttrain.env import KERNELS, MATMUL_PRECISION
from disttrain.errors import ConfigError, unknown_name
from disttrain.kernels.instruction_sets import NUMPY, RELEVANT_FLAGS, runnable
from disttrain.kernels.precision import PRECISIONS


class AbsentError(Exception):
    """The system lacks what the workload needs; says what."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """A model of a workload, and what it does: each returns when it is done, None is for what it cannot do.

    Attributes:
        parameters: number of trained weights' elements, as the framework counts them.
        step: takes one step on the workload's batch, forward, backward and optimizer; returns the loss, or what
            `float` makes it from.
        predict: returns the logits for any number of inputs, computed in batches of the workload's size.
        epoch: takes steps over inputs and labels in shuffled batches of the workload's size.
    """

    parameters: int
    step: Callable[[], Any] | None = None
    predict: Callable[[Array], Array] | None = None
    epoch: Callable[[Array, Array], Any] | None = None


def names() -> list[str]:
    """Return the names of all systems, without forms: ours first."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(found, key=lambda name: (not is_ours(name), name))


def forms() -> list[str]:
    """Return the names of disttrain in each other precision, and with the kernels of each instruction set."""
    return [f"disttrain:{word}" for word in (*PRECISIONS[1:], *_kernels())]


def environment(name: str) -> dict[str, str]:
    """Return the variables that a system's worker has beside the rest: those of its form.

    Raises:
        ConfigError: there is no such form; the message names the nearest.
    """
    base, *words = name.split(":")
    if words and not is_ours(base):
        raise ConfigError(f"{name!r}: only disttrain has forms")
    found = {}
    for word in words:
        if word not in (*PRECISIONS, *_kernels()):
            raise unknown_name("form", word, [*PRECISIONS, *_kernels()])
        found[MATMUL_PRECISION if word in PRECISIONS else KERNELS] = word
    return found


def module_name(name: str) -> str:
    """Return the module of a system.

    Raises:
        ConfigError: there is none; the message names the nearest.
    """
    base = name.partition(":")[0]
    if "." in base:
        return base
    if base not in names():
        raise unknown_name("system", base, names())
    return f"{__name__}.{base}"


def is_ours(name: str) -> bool:
    """Return whether a system is disttrain in one of its forms."""
    return name.rpartition(".")[2].startswith("disttrain")


def _kernels() -> list[str]:
    """Return what ``DISTTRAIN_KERNELS`` may be, on whatever machine."""
    return [*(each.name for each in runnable(RELEVANT_FLAGS)), NUMPY]
