"""The softmax family."""

import numpy as np

from disttrain.autodiff.composite import composite
from disttrain.autodiff.joining import Axes, Joined, each
from disttrain.autodiff.op import op
from disttrain.autodiff.ops.elementwise import exp
from disttrain.autodiff.ops.reduction import sum
from disttrain.backend import Array, get_array_module
from disttrain.kernels import softmax as kernels


@op
def softmax(x: Array, *, axis: int = -1) -> Array:
    """Return ``exp(x) / sum(exp(x))`` along `axis`, for any size of `x`. Shape: as `x`."""
    y = get_array_module(x).exp(x - x.max(axis=axis, keepdims=True))
    y /= y.sum(axis=axis, keepdims=True)
    return y


softmax.kernel(kernels.softmax)


@softmax.into
def _(x: Array, out: Array, *, axis: int = -1) -> None:
    np.exp(np.subtract(x, x.max(axis=axis, keepdims=True), out), out)
    out /= out.sum(axis=axis, keepdims=True)


@softmax.vjp
def _(g: Array, y: Array, x: Array, *, axis: int = -1) -> tuple[Array, ...]:
    # x is kept for losses: see `argument_of`
    return (_softmax_gradient(g, y, axis=axis),)


@composite
def _softmax_gradient(g: Array, y: Array, *, axis: int) -> Array:
    return y * (g - sum(g * y, axis=axis, keepdims=True))


_softmax_gradient.kernel(kernels.softmax_gradient)


@op
def log_softmax(x: Array, *, axis: int = -1) -> Array:
    """Return the logarithm of `softmax`, exact where that would underflow. Shape: as `x`."""
    shifted = x - x.max(axis=axis, keepdims=True)
    xp = get_array_module(x)
    return shifted - xp.log(xp.exp(shifted).sum(axis=axis, keepdims=True))


log_softmax.kernel(kernels.log_softmax)


@log_softmax.vjp
def _(g: Array, y: Array, _x: Array, *, axis: int = -1) -> tuple[Array, ...]:
    return (_log_softmax_gradient(g, y, axis=axis),)


@composite
def _log_softmax_gradient(g: Array, y: Array, *, axis: int) -> Array:
    return g - exp(y) * sum(g, axis=axis, keepdims=True)


_log_softmax_gradient.kernel(kernels.log_softmax_gradient)


def _joined(axes: Axes, made: Array, *given: Array, axis: int = -1) -> Joined:
    return each(0, 1, inner=1)(axes, made, *given) if axis in (-1, len(made.shape) - 1) else None


for _op in (softmax, _softmax_gradient, log_softmax, _log_softmax_gradient):
    _op.joined = _joined
