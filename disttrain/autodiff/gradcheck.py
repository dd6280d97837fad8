"""Gradients against finite differences: one check for every op, public because users write ops too."""

from collections.abc import Callable
from typing import Any

import numpy as np

from disttrain.autodiff.op import array_of
from disttrain.autodiff.ops import sum
from disttrain.autodiff.tensor import Tensor
from disttrain.autodiff.transform import grad
from disttrain.backend import Array, random_generator
from disttrain.errors import ConfigError, GradientMismatchError

# Central differences err by h**2 / 6 * f''' and by rounding, 1e-16 / h * f: with h = 1e-5 each about 1e-11 of f.
_STEP = 1e-5


def check_grads(function: Callable[..., Any], *args: Array, order: int = 1, tolerance: float = 1e-6) -> None:
    """Compare the gradients of `function` in all `args` with central differences, in float64.

    Args:
        function: takes arrays, returns a Tensor of any shape; ops qualify. Smooth within 1e-5 of `args`.
        args: arrays of any float dtype; computed with as float64.
        order: 2 checks the gradient of the gradient too, and so on.
        tolerance: allowed error, relative to the largest gradient of the argument (at least 1).

    Raises:
        GradientMismatchError: names the argument, the place and both values.
    """
    if order < 1:
        raise ConfigError(f"order must be at least 1, not {order}")
    points = [np.array(array_of(a), dtype=np.float64) for a in args]
    numbers = tuple(range(len(points)))
    shape = np.shape(array_of(function(*[Tensor(p) for p in points])))
    weights = random_generator("check_grads", order).standard_normal(shape)

    def weighted(*xs: Any) -> Any:
        return sum(function(*xs) * weights)

    gradient = grad(weighted, numbers)
    for number, got in enumerate(gradient(*points)):
        _compare(weighted, points, number, array_of(got), tolerance)
    for number in numbers if order > 1 else ():

        def one(*xs: Any, number: int = number) -> Any:
            return gradient(*[x if isinstance(x, Tensor) else Tensor(x) for x in xs])[number]

        check_grads(one, *points, order=order - 1, tolerance=tolerance)


def _compare(function: Callable[..., Any], points: list[Array], number: int, got: Array, tolerance: float) -> None:
    expected = np.empty_like(points[number])
    for at in np.ndindex(expected.shape):
        ends = []
        for step in (_STEP, -_STEP):
            moved = [p.copy() for p in points]
            moved[number][at] += step
            ends.append(float(array_of(function(*[Tensor(p) for p in moved]))))
        expected[at] = (ends[0] - ends[1]) / (2 * _STEP)
    error = np.abs(got - expected)
    limit = tolerance * max(1.0, float(np.abs(expected).max(initial=0)))
    if error.size and not error.max() <= limit:  # NaN fails too
        at = np.unravel_index(np.nanargmax(np.where(np.isnan(error), np.inf, error)), error.shape)
        place = tuple(int(i) for i in at)
        raise GradientMismatchError(
            f"argument {number} at {place}: the rule gives {got[at]:.9g}, finite differences "
            f"{expected[at]:.9g} (allowed difference {limit:.1g}); the rule or a sign in it is wrong, or the "
            f"function is not smooth there"
        )
