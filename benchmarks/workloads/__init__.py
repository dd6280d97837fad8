"""Workloads: one a file, whose name in capitals is the workload's."""

import importlib
import math
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.architecture import Array, Part, initial_weights
from disttrain.errors import unknown_name

_SEED = 20


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """A rule by name ("sgd", "adam", "adamw") and its numbers; those that are not here are the system's own."""

    name: str
    learning_rate: float
    momentum: float = 0.0
    weight_decay: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model, a batch that it is trained on, and how; the loss is the cross-entropy of logits and labels.

    Attributes:
        name: as it is asked for.
        title: what it is, in a few words.
        parts: the model.
        input_shape: of the batch.
        vocabulary: number of tokens where the inputs are tokens, else 0: they are normally distributed.
        label_shape: of the labels.
        classes: number of different labels.
        optimizer: the rule.
        learning_steps: steps before timing, over which the loss must fall.
    """

    name: str
    title: str
    parts: tuple[Part, ...]
    input_shape: tuple[int, ...]
    vocabulary: int = 0
    label_shape: tuple[int, ...]
    classes: int
    optimizer: Optimizer
    learning_steps: int

    def batch(self) -> tuple[Array, Array]:
        """Return inputs, float32 or integers, and labels, int64: always the same."""
        generator = np.random.default_rng(_SEED)
        if self.vocabulary:
            x: Array = generator.integers(self.vocabulary, size=self.input_shape)
        else:
            x = generator.standard_normal(self.input_shape, np.float32)
        return x, generator.integers(self.classes, size=self.label_shape)

    def enlarged(self, times: int) -> "Workload":
        """Return the workload with that many times the samples in a batch."""
        inputs, labels = ((times * first, *rest) for first, *rest in (self.input_shape, self.label_shape))
        return replace(self, input_shape=inputs, label_shape=labels)

    def weights(self) -> Iterator[Array]:
        """Yield the initial weights: always the same."""
        return initial_weights(self.parts, np.random.default_rng(_SEED + 1))

    def parameters(self) -> int:
        """Return the number of trained weights' elements."""
        return sum(math.prod(array.shape) for array in self.weights())


def names() -> list[str]:
    """Return the names of all workloads."""
    return sorted(module.name.upper() for module in pkgutil.iter_modules(__path__))


def get(name: str) -> Workload:
    """Return the workload of a name, in either case.

    Raises:
        ConfigError: there is none; the message names the nearest.
    """
    if name.upper() not in names():
        raise unknown_name("workload", name, map(str.lower, names()))
    workload = importlib.import_module(f"{__name__}.{name.lower()}").WORKLOAD
    assert isinstance(workload, Workload)
    return workload
