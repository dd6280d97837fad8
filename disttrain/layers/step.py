"""What a layer may know of the step it runs in: whether it trains, which samples of the batch it sees."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace

from disttrain.backend import Array


@dataclass(frozen=True, kw_only=True)
class Step:
    """The circumstances of a forward pass.

    Attributes:
        training: whether dropout drops and batch normalization uses the batch.
        trainable: whether the layer that runs, and those that hold it, are trained.
        number: of the training step, counted from 0 over all epochs; part of the key of random numbers.
        first: place of this rank's first sample in the global batch; the same.
        total: sums an array over all ranks, differentiably; the array itself where one rank sees all.
        keeps: whether layers change their state in this pass, as moving averages: of a rank's shards, in the first.
    """

    training: bool = False
    trainable: bool = True
    number: int = 0
    first: int = 0
    total: Callable[[Array], Array] = lambda x: x
    keeps: bool = True


_current: ContextVar[Step] = ContextVar("step", default=Step())  # noqa: B039  # a Step is frozen


def current_step() -> Step:
    """Return the step that runs here; outside of one, a step that does not train."""
    return _current.get()


@contextlib.contextmanager
def running(step: Step) -> Iterator[Step]:
    """Make `step` the current one inside a ``with`` block."""
    token = _current.set(step)
    try:
        yield step
    finally:
        _current.reset(token)


@contextlib.contextmanager
def training_mode(training: bool | None, *, trainable: bool = True) -> Iterator[None]:
    """Set how the layers inside a ``with`` block behave.

    Args:
        training: whether the step trains; None leaves it as it is.
        trainable: False freezes them; True leaves them as they are.
    """
    step = current_step()
    if training is None:
        training = step.training
    with running(replace(step, training=training, trainable=step.trainable and trainable)):
        yield
