"""Stochastic gradient descent, with momentum."""

from disttrain.backend import Array
from disttrain.errors import ConfigError
from disttrain.kernels import optimizer as kernels
from disttrain.optimizers.optimizer import Optimizer, Schedule, kernel_of


class SGD(Optimizer):
    """Stochastic gradient descent: ``w -= learning_rate * g``.

    With `momentum`: ``velocity = momentum * velocity - learning_rate * g; w += velocity``; with `nesterov`
    the last is ``w += momentum * velocity - learning_rate * g``.

    Args:
        learning_rate: a number, or a function from the step to one.
        momentum: from 0 to below 1.
        nesterov: whether to look ahead.
        gradient_accumulation_steps: how many steps' gradients make up one update, by their mean; None: each is one.

    Sources: Keras 3; Sutskever et al., "On the importance of initialization and momentum in deep learning",
    2013.
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.01,
        momentum: float = 0.0,
        *,
        nesterov: bool = False,
        gradient_accumulation_steps: int | None = None,
    ) -> None:
        super().__init__(learning_rate, gradient_accumulation_steps)
        if not 0 <= momentum < 1:
            raise ConfigError(f"SGD: momentum must be from 0 to below 1, not {momentum}")
        self.momentum = momentum
        self.nesterov = nesterov
        self.slot_names = ("velocity",) if momentum else ()

    def update(
        self, parameter: Array, gradient: Array, slots: dict[str, Array], *, learning_rate: float, step: int
    ) -> None:
        """Change `parameter` and its velocity in place."""
        change = gradient * -learning_rate
        if self.momentum:
            velocity = slots["velocity"]
            velocity *= self.momentum
            velocity += change
            if self.nesterov:
                change += self.momentum * velocity
            else:
                change = velocity
        parameter += change


@kernel_of(SGD.update)
def _(
    self: SGD, parameter: Array, gradient: Array, slots: dict[str, Array], *, learning_rate: float, step: int
) -> bool:
    if not self.momentum:
        return kernels.sgd(parameter, gradient, rate=learning_rate)
    return kernels.momentum(
        parameter, gradient, slots["velocity"],
        rate=learning_rate, momentum=self.momentum, nesterov=self.nesterov,
    )  # fmt: skip
