"""Optimizers, with the names, defaults and formulas of Keras 3."""

from collections.abc import Callable

from disttrain.errors import ConfigError, unknown_name
from disttrain.optimizers.adam import Adam, AdamW
from disttrain.optimizers.loss_scale import LossScaleOptimizer
from disttrain.optimizers.optimizer import Optimizer
from disttrain.optimizers.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "LossScaleOptimizer", "Optimizer", "get"]

_KNOWN: dict[str, Callable[[], Optimizer]] = {"sgd": SGD, "adam": Adam, "adamw": AdamW}


def get(optimizer: str | Optimizer) -> Optimizer:
    """Return a new optimizer of that name with its defaults, or `optimizer` itself when it is one."""
    if isinstance(optimizer, Optimizer):
        return optimizer
    if not isinstance(optimizer, str):
        raise ConfigError(f"an optimizer is a name or an Optimizer, not {optimizer!r}")
    if optimizer.lower() not in _KNOWN:
        raise unknown_name("optimizer", optimizer, _KNOWN)
    return _KNOWN[optimizer.lower()]()
