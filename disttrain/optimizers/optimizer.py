"""Optimizer: a rule that changes a parameter by its gradient, in place, and the arrays it remembers."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from disttrain.autodiff.op import array_of
from disttrain.backend import Array, get_array_module
from disttrain.errors import ConfigError, ShapeError

Schedule = Callable[[int], float]
Kernel = Callable[..., bool]

_KERNELS: dict[Callable[..., None], Kernel] = {}  # by the rule they compute: a subclass's own `update` has none

# of a parameter at a time, so that the passes over it, its gradient and the slots stay in the cache
_BLOCK = 1 << 15


def kernel_of(update: Callable[..., None]) -> Callable[[Kernel], Kernel]:
    """Attach to the rule `update` a kernel, which changes whole flat arrays in one call; a decorator.

    It gets the rule's arguments and returns whether it applied; where not, it has changed nothing.
    """

    def attach(kernel: Kernel) -> Kernel:
        _KERNELS[update] = kernel
        return kernel

    return attach


class Optimizer(ABC):
    """Base of all optimizers: one method, `update`, and the names of the slots it needs.

    A rule works element by element; `apply` calls it on blocks of flat views, or its kernel on the whole.

    Args:
        learning_rate: a number, or a function from the step, counted from 0, to one.
        gradient_accumulation_steps: how many steps' gradients make up one update, by their mean; None: each is one.

    Attributes:
        steps: number of steps taken.
        slots: for each parameter, what the rule remembers: arrays of its shape by name.
    """

    slot_names: tuple[str, ...] = ()

    def __init__(self, learning_rate: float | Schedule, gradient_accumulation_steps: int | None = None) -> None:
        if not callable(learning_rate) and not learning_rate >= 0:
            raise ConfigError(f"{type(self).__name__}: learning_rate must be at least 0, not {learning_rate}")
        accumulated = gradient_accumulation_steps
        if accumulated is not None and (not isinstance(accumulated, int) or accumulated < 2):
            raise ConfigError(
                f"{type(self).__name__}: gradient_accumulation_steps must be an integer of at least 2, or None, "
                f"not {accumulated!r}"
            )
        self.learning_rate = learning_rate
        self.gradient_accumulation_steps = accumulated
        self.steps = 0
        self.slots: list[dict[str, Array]] = []
        self._accumulated: list[Array] = []

    @property
    def iterations(self) -> int:
        """Number of updates."""
        return self.steps // (self.gradient_accumulation_steps or 1)

    @iterations.setter
    def iterations(self, number: int) -> None:
        self.steps = number * (self.gradient_accumulation_steps or 1)

    @property
    def is_due(self) -> bool:
        """Whether the next step is one with an update."""
        return (self.steps + 1) % (self.gradient_accumulation_steps or 1) == 0

    @property
    def rule(self) -> "Optimizer":
        """The optimizer that takes the steps: this one, unless it is made around another."""
        return self

    @property
    def loss_scale(self) -> float | None:
        """What the loss of the next step is multiplied by, its gradients divided by; None: nothing is."""
        return None

    def lower_loss_scale(self) -> bool:
        """Lower `loss_scale` because the next step is to be left out; return whether there is one, and it could be."""
        return False

    def progress(self) -> dict[str, Any]:
        """Return what training goes on from, besides `steps` and `slots`, as JSON values."""
        return {}

    def restore(self, progress: dict[str, Any]) -> None:  # noqa: B027  # most have nothing else to go on from
        """Go on from what `progress` returned, once `steps` are set; what is missing is as at first."""

    @abstractmethod
    def update(
        self, parameter: Array, gradient: Array, slots: dict[str, Array], *, learning_rate: float, step: int
    ) -> None:
        """Change `parameter` and `slots` in place.

        Args:
            parameter: shape ``(n,)``.
            gradient: the same; not to be changed; of float16 parameters as float32, as the slots are.
            slots: arrays of the same shape, by name; zeros at first.
            learning_rate: of this step.
            step: counted from 1.
        """

    def apply(self, grads: Sequence[Any], variables: Sequence[Any]) -> None:
        """Take one step: change `variables` in place by their gradients, or keep these until there are enough.

        Args:
            grads: arrays or Tensors, one for each variable.
            variables: contiguous arrays or Tensors; in each call the same.

        Raises:
            ShapeError: a gradient has another shape than its variable, or a variable cannot be changed in place.
        """
        parameters, gradients = [array_of(v) for v in variables], [array_of(g) for g in grads]
        self.build(parameters)
        if [p.shape for p in parameters] != [g.shape for g in gradients]:
            raise ShapeError(
                f"gradients of shapes {[g.shape for g in gradients]} for variables of shapes "
                f"{[p.shape for p in parameters]}"
            )
        for parameter in parameters:
            if not hasattr(parameter, "__setitem__") or not parameter.flags.c_contiguous:
                raise ShapeError(
                    f"a variable of shape {parameter.shape} and type {type(parameter).__name__} cannot be changed in "
                    "place; give contiguous arrays, as numpy.ascontiguousarray makes them"
                )
        number = self.gradient_accumulation_steps
        if number is None:
            self.take_step(gradients, parameters)
            return
        if not self._accumulated:
            self._accumulated = [get_array_module(g).zeros_like(g) for g in gradients]
        for accumulated, gradient in zip(self._accumulated, gradients, strict=True):
            accumulated += gradient / number
        if not self.is_due:
            self.steps += 1
            return
        self.take_step(self._accumulated, parameters)
        self._accumulated = []

    def take_step(self, gradients: Sequence[Array], parameters: Sequence[Array]) -> None:
        """Change `parameters` in place by `gradients`, whatever the number of steps that these are the mean of.

        Args:
            gradients: arrays, one for each parameter, of its shape.
            parameters: contiguous arrays; in each call the same.
        """
        self.build(parameters)
        # float: a schedule's numpy.float64 would compute in float64
        rate = float(self.learning_rate(self.steps) if callable(self.learning_rate) else self.learning_rate)
        step = self.iterations + 1
        self.steps += 1
        kernel = _KERNELS.get(type(self).update)
        for parameter, gradient, slots in zip(parameters, gradients, self.slots, strict=True):
            flat, flat_gradient = parameter.reshape(-1), gradient.reshape(-1)
            flat_slots = {name: slot.reshape(-1) for name, slot in slots.items()}
            if kernel is not None and kernel(self, flat, flat_gradient, flat_slots, learning_rate=rate, step=step):
                continue
            for start in range(0, flat.size, _BLOCK):
                block = slice(start, start + _BLOCK)
                self.update(
                    flat[block],
                    flat_gradient[block].astype(_wide(flat), copy=False),
                    {name: slot[block] for name, slot in flat_slots.items()},
                    learning_rate=rate,
                    step=step,
                )

    def build(self, variables: Sequence[Array]) -> None:
        """Make the slots for `variables`, arrays; does nothing if they are there.

        Raises:
            ConfigError: there are slots, for other variables.
        """
        shapes = [v.shape for v in variables]
        if not self.slots:
            self.slots = [
                {name: get_array_module(v).zeros(v.shape, _wide(v)) for name in self.slot_names} for v in variables
            ]
            self._shapes = shapes
        if shapes != self._shapes:
            raise ConfigError(
                f"{type(self).__name__} has taken steps for variables of shapes {self._shapes} and got {shapes}; "
                "an optimizer belongs to one model: make another for this one"
            )

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this optimizer again."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}


def _wide(variable: Array) -> Any:
    """Return the dtype to compute in: squares of float16 gradients would vanish in float16."""
    return "float32" if variable.dtype == "float16" else variable.dtype
