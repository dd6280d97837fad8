"""Activations beyond those that are elementary functions. Names, defaults and formulas as in Keras 3."""

import math

from disttrain.autodiff.composite import composite
from disttrain.autodiff.joining import each, elementwise, nowhere
from disttrain.autodiff.op import op
from disttrain.autodiff.ops.elementwise import cast, sigmoid, tanh, where
from disttrain.autodiff.ops.erf import erf
from disttrain.backend import Array, get_array_module
from disttrain.kernels import elementwise as elementwise_kernels
from disttrain.kernels import gelu as kernels

_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805


@composite
def gelu(x: Array, *, approximate: bool = False) -> Array:
    """Return ``x * P(X <= x)`` for a standard normal X: ``x / 2 * (1 + erf(x / sqrt(2)))``.

    Args:
        x: any shape.
        approximate: use ``tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))`` in place of the error function, which differs
            by less than 5e-4.

    Source: Hendrycks & Gimpel, "Gaussian error linear units", 2016.
    """
    if not approximate:
        return x * 0.5 * (1 + erf(x * math.sqrt(0.5)))
    wide = cast(x, dtype="float32") if x.dtype == "float16" else x  # whose third power soon overflows
    inner = wide * (1 + wide * wide * 0.044715) * math.sqrt(2 / math.pi)
    y = wide * 0.5 * (1 + tanh(inner))
    return cast(y, dtype=x.dtype) if x.dtype == "float16" else y


gelu.kernel(kernels.gelu)
gelu.gradient(0).kernel(kernels.gelu_gradient)
gelu.joined = each(0)
gelu.gradient(0).joined = each(2, 0, 1)


@composite
def silu(x: Array) -> Array:
    """Return ``x * sigmoid(x)``, also called swish."""
    return x * sigmoid(x)


silu.kernel(elementwise_kernels.silu)
silu.gradient(0).kernel(elementwise_kernels.silu_gradient)


@op
def softplus(x: Array) -> Array:
    """Return ``log(1 + exp(x))``, which does not overflow."""
    return get_array_module(x).logaddexp(x, 0)


softplus.kernel(elementwise_kernels.softplus)


@softplus.vjp
def _(g: Array, _y: Array, x: Array) -> tuple[Array, ...]:
    return (_softplus_gradient(g, x),)


@composite
def _softplus_gradient(g: Array, x: Array) -> Array:
    return g * sigmoid(x)


_softplus_gradient.kernel(elementwise_kernels.softplus_gradient)


@op
def elu(x: Array, *, alpha: float = 1.0) -> Array:
    """Return `x` where it is positive, else ``alpha * (exp(x) - 1)``.

    Source: Clevert et al., "Fast and accurate deep network learning by exponential linear units", 2015.
    """
    xp = get_array_module(x)
    return xp.where(x > 0, x, xp.expm1(xp.minimum(x, 0)) * alpha)


@elu.vjp
def _(g: Array, y: Array, x: Array, *, alpha: float = 1.0) -> tuple[Array, ...]:
    return (where(x > 0, g, g * (y + alpha)),)


def selu(x: Array) -> Array:
    """Return ``scale * elu(x, alpha)``, with the two constants that keep mean 0 and variance 1 through layers.

    Source: Klambauer et al., "Self-normalizing neural networks", 2017.
    """
    return elu(x, alpha=_SELU_ALPHA) * _SELU_SCALE


@op
def leaky_relu(x: Array, *, negative_slope: float = 0.2) -> Array:
    """Return `x` where it is positive, else ``negative_slope * x``; the gradient at 0 is `negative_slope`."""
    return get_array_module(x).where(x > 0, x, x * negative_slope)


@leaky_relu.vjp
def _(g: Array, _y: Array, x: Array, *, negative_slope: float = 0.2) -> tuple[Array, ...]:
    return (where(x > 0, g, g * negative_slope),)


leaky_relu.joined = elementwise
silu.joined = softplus.joined = each(0)
silu.gradient(0).joined = each(2, 0, 1)
_softplus_gradient.joined = each(0, 1)
elu.joined = nowhere
