"""Adam, and AdamW with decoupled weight decay."""

import math
from typing import Any

from disttrain.backend import Array, get_array_module
from disttrain.errors import ConfigError
from disttrain.kernels import optimizer as kernels
from disttrain.optimizers.optimizer import Optimizer, Schedule, kernel_of


class Adam(Optimizer):
    """Adam: steps by the mean of the gradients over the root of the mean of their squares.

    ``m += (1 - beta_1) * (g - m); v += (1 - beta_2) * (g**2 - v)``,
    ``w -= learning_rate * sqrt(1 - beta_2**t) / (1 - beta_1**t) * m / (sqrt(v) + epsilon)``.

    Args:
        learning_rate: a number, or a function from the step to one.
        beta_1: decay of the mean, from 0 to below 1.
        beta_2: decay of the mean of squares, from 0 to below 1.
        epsilon: added to the root, as Keras does: before the correction of `v`.
        gradient_accumulation_steps: how many steps' gradients make up one update, by their mean; None: each is one.

    Sources: Keras 3; Kingma & Ba, "Adam: a method for stochastic optimization", 2014.
    """

    slot_names = ("momentum", "velocity")

    def __init__(
        self,
        learning_rate: float | Schedule = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        *,
        gradient_accumulation_steps: int | None = None,
    ) -> None:
        super().__init__(learning_rate, gradient_accumulation_steps)
        for name, beta in (("beta_1", beta_1), ("beta_2", beta_2)):
            if not 0 <= beta < 1:
                raise ConfigError(f"{type(self).__name__}: {name} must be from 0 to below 1, not {beta}")
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = epsilon

    def update(
        self, parameter: Array, gradient: Array, slots: dict[str, Array], *, learning_rate: float, step: int
    ) -> None:
        """Change `parameter` and the two means in place."""
        xp = get_array_module(parameter)
        mean, square = slots["momentum"], slots["velocity"]
        scratch = gradient - mean
        scratch *= 1 - self.beta_1
        mean += scratch
        xp.multiply(gradient, gradient, out=scratch)
        scratch -= square
        scratch *= 1 - self.beta_2
        square += scratch
        xp.sqrt(square, out=scratch)
        scratch += self.epsilon
        xp.divide(mean, scratch, out=scratch)
        scratch *= self._corrected(learning_rate, step)
        parameter -= scratch

    def _corrected(self, learning_rate: float, step: int) -> float:
        """Return the learning rate, corrected for means that began at 0."""
        return learning_rate * math.sqrt(1 - self.beta_2**step) / (1 - self.beta_1**step)

    def _step(
        self,
        parameter: Array,
        gradient: Array,
        slots: dict[str, Array],
        *,
        learning_rate: float,
        step: int,
        keep: float,
    ) -> bool:
        return kernels.adam(
            parameter, gradient, slots["momentum"], slots["velocity"],
            rate=self._corrected(learning_rate, step), keep=keep,
            beta_1=self.beta_1, beta_2=self.beta_2, epsilon=self.epsilon,
        )  # fmt: skip


@kernel_of(Adam.update)
def _(self: Adam, *arrays: Any, learning_rate: float, step: int) -> bool:
    return self._step(*arrays, learning_rate=learning_rate, step=step, keep=1.0)


class AdamW(Adam):
    """Adam that first shrinks the weights: ``w -= learning_rate * weight_decay * w``.

    Args:
        learning_rate: a number, or a function from the step to one.
        weight_decay: share of each weight that a step with a learning rate of 1 would take away.
        beta_1: as in Adam.
        beta_2: as in Adam.
        epsilon: as in Adam.
        gradient_accumulation_steps: as in Adam.

    Source: Loshchilov & Hutter, "Decoupled weight decay regularization", 2019.
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.001,
        weight_decay: float = 0.004,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        *,
        gradient_accumulation_steps: int | None = None,
    ) -> None:
        super().__init__(
            learning_rate, beta_1, beta_2, epsilon, gradient_accumulation_steps=gradient_accumulation_steps
        )
        self.weight_decay = weight_decay

    def update(
        self, parameter: Array, gradient: Array, slots: dict[str, Array], *, learning_rate: float, step: int
    ) -> None:
        """Shrink `parameter`, then change it as Adam does."""
        parameter *= 1 - learning_rate * self.weight_decay
        super().update(parameter, gradient, slots, learning_rate=learning_rate, step=step)


@kernel_of(AdamW.update)
def _(self: AdamW, *arrays: Any, learning_rate: float, step: int) -> bool:
    keep = 1 - learning_rate * self.weight_decay
    return self._step(*arrays, learning_rate=learning_rate, step=step, keep=keep)
