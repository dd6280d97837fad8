"""Numbers that are not finite: found before a weight changes, and traced to where they came from."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from disttrain.autodiff.op import array_of
from disttrain.backend import Array, get_array_module, to_host
from disttrain.comm import Communicator
from disttrain.data import Batch
from disttrain.data_parallel import GradientSum
from disttrain.errors import ConfigError
from disttrain.layers import Layer
from disttrain.layers.layer import watching

POLICIES = ("raise", "skip")

# Steps in a row that may be left out: a few bad samples cost fewer, and a model that has diverged has no others.
MOST_SKIPPED = 16


def check_policy(policy: str) -> None:
    """Raise ConfigError if `policy` is none of `POLICIES`."""
    if policy not in POLICIES:
        raise ConfigError(f"on_nonfinite is 'raise' or 'skip', not {policy!r}")


def is_finite(array: Array) -> bool:
    """Return whether all numbers of a contiguous array are finite: by one pass over it, most often."""
    xp, flat = get_array_module(array), array.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):  # the sum of squares of finite numbers may be infinite
        return bool(xp.isfinite(xp.dot(flat, flat)) or xp.isfinite(flat).all())


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a step's numbers ceased to be finite.

    Attributes:
        rank: that met it first.
        words: what it met, and where; None where each rank's own numbers are finite.
    """

    rank: int = 0
    words: str | None = None

    def __str__(self) -> str:
        if self.words is None:
            return "each rank's own numbers are finite, their sum over the ranks, as it travels, is not"
        return f"rank {self.rank} met it first in {self.words}"


class Search:
    """Looks for the first array that is not finite among those that a rank computes in a step.

    Args:
        batch: this rank's part of it.
    """

    def __init__(self, batch: Batch) -> None:
        self._seen = 0
        self._found: tuple[int, str] | None = None
        x = to_host(batch.x)
        rows: Any = np.flatnonzero(~np.isfinite(x).reshape(len(x), -1).all(axis=1)) if x.dtype.kind == "f" else ()
        if len(rows):
            self._found = 0, f"x of sample {batch.samples[rows[0]]} ({_words(x[rows[0]])})"

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Look at the outputs of layers inside a ``with`` block."""
        token = watching.set(lambda layer, output: self._see(f"the output of layer {layer.path!r}", array_of(output)))
        try:
            yield
        finally:
            watching.reset(token)

    def see_loss(self, loss: float) -> None:
        """Look at the loss of this rank's samples."""
        self._see("the loss", np.array(loss))

    def see_gradients(self, model: Layer, gradients: GradientSum) -> None:
        """Look at this rank's own gradients, in the order in which backward computes them."""
        for weight in reversed(model.trainable_weights):
            for part in gradients.parts(weight):
                self._see(f"the gradient of {weight.name!r}", part)

    def share(self, comm: Communicator) -> Origin:
        """Return what the ranks together have found: the earliest of what a step computes; every rank calls this."""
        found = comm.all_gather_json(self._found)
        places = [(each[0], rank) for rank, each in enumerate(found) if each is not None]
        if not places:
            return Origin()
        _, rank = min(places)
        return Origin(rank=rank, words=found[rank][1])

    def _see(self, what: str, array: Array) -> None:
        self._seen += 1
        if self._found is None and not is_finite(array):
            self._found = self._seen, f"{what} ({_words(to_host(array))})"


def _words(array: np.ndarray[Any, Any]) -> str:
    """Return how many numbers of an array are not finite, and the first of them with its place."""
    bad = np.argwhere(~np.isfinite(array))
    if not array.ndim:
        return str(array)
    first: Sequence[int] = bad[0].tolist()
    return f"{array[tuple(first)]} at {first}, and so in {len(bad)} of {array.size} numbers"
