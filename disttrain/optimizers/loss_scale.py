"""LossScaleOptimizer: gradients that are neither too small nor too large for the floats that they travel as."""

import math
from collections.abc import Sequence
from typing import Any

from disttrain.autodiff.op import array_of
from disttrain.backend import Array, get_array_module
from disttrain.errors import CheckpointError, ConfigError, NonFiniteError
from disttrain.optimizers.optimizer import Optimizer

_HIGHEST = 2.0**127  # of float32
# The least normal float16: a scale below would itself lose digits there.
_LOWEST = 2.0**-14


def _inner(name: str) -> Any:
    """Return the attribute `name` of the inner optimizer, as one of the outer."""
    return property(
        lambda self: getattr(self.inner_optimizer, name),
        lambda self, value: setattr(self.inner_optimizer, name, value),
    )


class LossScaleOptimizer(Optimizer):
    """An optimizer whose gradients are computed, and travel, multiplied by a scale that adapts to them.

    The loss is multiplied by the scale, gradients are divided by it before `inner_optimizer` sees them. Where they
    are not finite, on any rank, the step is left out, on all, and the scale halves; after `dynamic_growth_steps` steps
    without that it doubles. Scales are powers of two: where nothing is too large or too small they change no bit.
    So gradients keep their digits in float16: with ``compression="float16"`` what is below 6e-8 vanishes, and
    what is beyond 65504 is infinite. (Gradients of float16 weights are divided in float16.)

    A loss that is not finite is nothing that a scale could mend: it is an error, or left out, as `compile` was told. So
    are gradients that are not finite with the least scale, ``2**-14``.

    Args:
        inner_optimizer: that takes the steps.
        initial_scale: a power of two.
        dynamic_growth_steps: after how many steps in a row, with an update or without, that were finite the scale
            doubles.
        name: what to call it.

    Attributes:
        dynamic_scale: the scale of the next step.

    Sources: Keras 3; Micikevicius et al., "Mixed precision training", 2018.
    """

    learning_rate = _inner("learning_rate")
    gradient_accumulation_steps = _inner("gradient_accumulation_steps")
    steps = _inner("steps")
    slots = _inner("slots")
    slot_names = _inner("slot_names")

    def __init__(
        self,
        inner_optimizer: Optimizer,
        initial_scale: float = 2.0**15,
        dynamic_growth_steps: int = 2000,
        name: str | None = None,
    ) -> None:
        if not isinstance(inner_optimizer, Optimizer) or inner_optimizer.loss_scale is not None:
            raise ConfigError(
                f"LossScaleOptimizer: inner_optimizer is an Optimizer without a loss scale, not {inner_optimizer!r}"
            )
        if not _is_scale(initial_scale):
            raise ConfigError(
                f"LossScaleOptimizer: initial_scale must be a power of two from 2**-14 to 2**127, not {initial_scale!r}"
            )
        steps = dynamic_growth_steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ConfigError(
                f"LossScaleOptimizer: dynamic_growth_steps must be an integer of at least 1, not {steps!r}"
            )
        self.inner_optimizer = inner_optimizer
        self.initial_scale = initial_scale
        self.dynamic_growth_steps = dynamic_growth_steps
        self.name = name
        self._scale = float(initial_scale)
        self._since = self.steps  # finite steps are counted from here

    @property
    def rule(self) -> Optimizer:
        """The inner optimizer."""
        return self.inner_optimizer

    @property
    def dynamic_scale(self) -> float:
        """The scale of the next step."""
        doublings = max(0, self.steps - self._since) // self.dynamic_growth_steps
        return min(math.ldexp(self._scale, min(doublings, 256)), _HIGHEST)

    @property
    def loss_scale(self) -> float:
        """The same."""
        return self.dynamic_scale

    def scale_loss(self, loss: Any) -> Any:
        """Return `loss` times the scale: for a loop of your own, which gives `apply` the gradients of that."""
        return loss * self.dynamic_scale

    def lower_loss_scale(self) -> bool:
        """Halve the scale because the next step is left out, and return whether it could be."""
        scale = self.dynamic_scale
        if scale == _LOWEST:
            return False
        self._scale, self._since = scale / 2, self.steps + 1
        return True

    def apply(self, grads: Sequence[Any], variables: Sequence[Any]) -> None:
        """Take one step by gradients of a loss that `scale_loss` gave, or leave it out and halve the scale.

        Args:
            grads: as of `Optimizer.apply`; of several ranks their sums, so that all do the same.
            variables: the same.

        Raises:
            NonFiniteError: gradients are not finite, and the scale is the least.
        """
        gradients = [array_of(g) for g in grads]
        if all(get_array_module(g).isfinite(g).all() for g in gradients):
            self.inner_optimizer.apply(
                [g / get_array_module(g).float32(self.dynamic_scale) for g in gradients], variables
            )
        elif self.lower_loss_scale():
            self.steps += 1
        else:
            raise NonFiniteError(
                f"the gradients are not finite at step {self.steps} (counted from 0); the loss scale is {_LOWEST:g} "
                "and cannot be lowered any more; no weight was changed. Look for NaN in the data, or lower the "
                "learning rate"
            )

    def take_step(self, gradients: Sequence[Array], parameters: Sequence[Array]) -> None:
        """Take a step of the inner optimizer, by gradients that are divided already."""
        self.inner_optimizer.take_step(gradients, parameters)

    def update(self, *arrays: Any, **options: Any) -> None:
        """Update as the inner optimizer does."""
        self.inner_optimizer.update(*arrays, **options)

    def build(self, variables: Sequence[Array]) -> None:
        """Make the inner optimizer's slots."""
        self.inner_optimizer.build(variables)

    def progress(self) -> dict[str, Any]:
        """Return the scale, and how many steps in a row were finite since it changed."""
        return {**self.inner_optimizer.progress(), "loss_scale": [self.dynamic_scale, self._counted()]}

    def restore(self, progress: dict[str, Any]) -> None:
        """Go on with another scale and count; without, with the initial scale."""
        self.inner_optimizer.restore(progress)
        scale, counted = progress.get("loss_scale", [self.initial_scale, 0])
        if not _is_scale(scale) or not isinstance(counted, int):
            raise CheckpointError(f"a loss scale of {scale!r}, {counted!r} steps old, is none that disttrain saves")
        self._scale, self._since = float(scale), self.steps - counted

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this optimizer again, the inner one as class and arguments."""
        inner = {"class": type(self.inner_optimizer).__name__, "config": self.inner_optimizer.get_config()}
        return {**super().get_config(), "inner_optimizer": inner}

    def _counted(self) -> int:
        """Return the number of finite steps since the scale changed."""
        return int(max(0, self.steps - self._since) % self.dynamic_growth_steps)


def _is_scale(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and _LOWEST <= value <= _HIGHEST and math.frexp(value)[0] == 0.5
