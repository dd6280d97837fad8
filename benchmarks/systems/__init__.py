"""Systems: one a file, whose name is the system's; a dotted path to a module of your own works as well.

Such a module has

- ``PACKAGES``: the distributions whose versions are recorded, the first one's beside each figure;
- ``PRECISION``: of products, as ``"float32"``;
- ``variants(workload)``: names of the settings among which the fastest is kept;
- ``build(workload, variant) -> Built``;
- ``product(a, b)``: the matrix product of two float32 arrays by what the model uses, as an array.

It imports its framework at the top: where that is not installed, the system is a gap. One whose name begins
with ``disttrain`` is ours, any other is a peer.
"""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from disttrain.errors import unknown_name


class AbsentError(Exception):
    """The system lacks what the workload needs; says what."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """A model that is ready to be trained on its workload's batch.

    Attributes:
        step: takes one step, forward, backward and optimizer, and returns when it is done: the loss, or what
            `float` makes it from.
        parameters: number of trained weights' elements, as the framework counts them.
    """

    step: Callable[[], Any]
    parameters: int


def names() -> list[str]:
    """Return the names of all systems: ours first."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(found, key=lambda name: (not is_ours(name), name))


def module_name(name: str) -> str:
    """Return the module of a system.

    Raises:
        ConfigError: there is none; the message names the nearest.
    """
    if "." in name:
        return name
    if name not in names():
        raise unknown_name("system", name, names())
    return f"{__name__}.{name}"


def is_ours(name: str) -> bool:
    """Return whether a system is disttrain in one of its forms."""
    return name.rpartition(".")[2].startswith("disttrain")
