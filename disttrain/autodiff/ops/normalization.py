"""Normalization, as composites of ops."""

import math
from collections.abc import Callable

from disttrain.autodiff.composite import composite
from disttrain.autodiff.joining import each, nowhere
from disttrain.autodiff.op import array_of, no_grad, op
from disttrain.autodiff.ops.elementwise import add, cast, divide, multiply, sqrt, subtract
from disttrain.autodiff.ops.reduction import mean as mean_over
from disttrain.autodiff.ops.reduction import sum
from disttrain.autodiff.ops.shape import concatenate, reshape
from disttrain.backend import Array, get_array_module
from disttrain.kernels import batch_norm as batch_kernels
from disttrain.kernels import layer_norm as layer_kernels


def moments(x: Array, *, total: Callable[[Array], Array] = lambda part: part) -> tuple[Array, Array]:
    """Return mean and (biased) variance of `x` over all axes but the last.

    Two passes, so that a mean much larger than the spread costs no digits; sums are formed and travel as float64,
    with the count of values at their end, so that how the values are divided does not show.

    Args:
        x: shape ``(..., channels)``; may be empty where others hold the values.
        total: sums an array of shape ``(channels + 1,)`` over all who hold a part of the values.

    Returns:
        Two arrays of shape ``(channels,)`` and the dtype of `x`.
    """
    wide = cast(x, dtype="float32") if x.dtype == "float16" else x  # whose squares and sums soon overflow
    flat = reshape(wide, shape=(-1, x.shape[-1]))
    xp = get_array_module(array_of(x))
    count = xp.asarray([flat.shape[0]], dtype="float64")

    def mean(values: Array) -> Array:
        sums = total(concatenate([sum(values, axis=0, dtype="float64"), count]))
        return cast(sums[:-1] / sums[-1:], dtype=wide.dtype)

    center = mean(flat)
    centered = flat - center
    return cast(center, dtype=x.dtype), cast(mean(centered * centered), dtype=x.dtype)


@op
def move_average(average: Array, value: Array, *, momentum: float) -> Array:
    """Move `average` towards `value`, in place: ``average * momentum + value * (1 - momentum)``; return it."""
    average[...] = average * momentum + value * (1 - momentum)
    return average


move_average.is_in_place = True


@composite
def batch_norm(x: Array, mean: Array, variance: Array, gamma: Array, beta: Array, *, epsilon: float) -> Array:
    """Return ``(x - mean) / sqrt(variance + epsilon) * gamma + beta``.

    Shapes: ``(..., channels)``, then four of ``(channels,) -> (..., channels)``.

    Source: Ioffe & Szegedy, "Batch normalization", 2015.
    """
    # ops, not operators: called with arrays, a plan sees them too
    scale = divide(gamma, sqrt(add(variance, epsilon)))
    return add(multiply(subtract(x, mean), scale), beta)


batch_norm.kernel(batch_kernels.batch_norm)


def batch_norm_of_batch(
    x: Array, gamma: Array, beta: Array, *, epsilon: float, total: Callable[[Array], Array] = lambda part: part
) -> tuple[Array, Array, Array]:
    """Return `batch_norm` of `x` by its own `moments`, and those two, which here have no gradient.

    The same as those two ops give, with fewer passes over `x`. Arguments as theirs; backward asks `total` to sum an
    array of shape ``(2 * channels + 1,)``.
    """
    if x.dtype == "float16":
        mean, variance = moments(x, total=total)
        return batch_norm(x, mean, variance, gamma, beta, epsilon=epsilon), mean, variance
    with no_grad():
        sums = total(_channel_sums(x))
        mean = cast(sums[:-1] / sums[-1:], dtype=x.dtype)
        sums = total(_square_sums(x, mean))
        variance = cast(sums[:-1] / sums[-1:], dtype=x.dtype)
    return _by_own_moments(x, mean, variance, gamma, beta, epsilon=epsilon, total=total), mean, variance


@composite
def _by_own_moments(
    x: Array, _mean: Array, _variance: Array, gamma: Array, beta: Array, *, epsilon: float,
    total: Callable[[Array], Array],
) -> Array:  # fmt: skip
    """Return `batch_norm` by the moments of `x`, which are given so that they need not be computed again."""
    return batch_norm(x, *moments(x, total=total), gamma, beta, epsilon=epsilon)


@_by_own_moments.fused
def _(
    x: Array, mean: Array, variance: Array, gamma: Array, beta: Array, *, epsilon: float,
    total: Callable[[Array], Array],
) -> Array:  # fmt: skip
    return batch_norm(x, mean, variance, gamma, beta, epsilon=epsilon)


@_by_own_moments.pull
def _(
    g: Array, _y: Array, x: Array, mean: Array, variance: Array, gamma: Array, _beta: Array, *, epsilon: float,
    total: Callable[[Array], Array], needs: tuple[bool, ...],
) -> tuple[Array, ...]:  # fmt: skip
    channels = x.shape[-1]
    own = _cotangent_sums(g, x, mean)
    return (
        _batch_norm_input(g, x, mean, variance, gamma, total(own), epsilon=epsilon) if needs[0] else None,
        None,
        None,
        own[channels:-1] / sqrt(add(variance, epsilon)) if needs[3] else None,
        own[:channels] if needs[4] else None,
    )


@op
def _channel_sums(x: Array) -> Array:
    """Return the sum of each channel, and the count of values in one. Shape: ``(..., n) -> (n + 1,)``, float64."""
    return _with_count(x, x)


@op
def _square_sums(x: Array, mean: Array) -> Array:
    """Return the sum of each channel's squares about `mean`, and the count. Shape: ``(..., n), (n,) -> (n + 1,)``."""
    centered = x - mean
    centered *= centered
    return _with_count(x, centered)


@op
def _cotangent_sums(g: Array, x: Array, mean: Array) -> Array:
    """Return the sums of `g` and of ``g * (x - mean)``, and the count.

    Shapes: ``(..., n), (..., n), (n,) -> (2 * n + 1,)``, float64.
    """
    centered = x - mean
    centered *= g
    return _with_count(x, g, centered)


@op
def _batch_norm_input(
    g: Array, x: Array, mean: Array, variance: Array, gamma: Array, sums: Array, *, epsilon: float
) -> Array:
    """Return the cotangent of `x` in `batch_norm_of_batch`, given the `_cotangent_sums` of the whole batch."""
    n = x.shape[-1]
    means = sums[:-1] / sums[-1:]
    square = variance + epsilon
    y = mean - x
    y *= (means[n:] / square).astype(x.dtype)
    y += g
    y -= means[:n].astype(x.dtype)
    y *= gamma / get_array_module(x).sqrt(square)
    return y


for _op, _kernel in (
    (_channel_sums, batch_kernels.channel_sums),
    (_square_sums, batch_kernels.square_sums),
    (_cotangent_sums, batch_kernels.cotangent_sums),
    (_batch_norm_input, batch_kernels.batch_norm_input),
):
    _op.kernel(_kernel)

batch_norm.joined = each(0, inner=1)
_batch_norm_input.joined = each(0, 1, inner=1)
_channel_sums.joined = _square_sums.joined = _cotangent_sums.joined = nowhere


def _with_count(x: Array, *values: Array) -> Array:
    """Return the sums over all axes of `values` but the last, and the count of rows of `x`, in one array of float64."""
    xp = get_array_module(x)
    axes = tuple(range(x.ndim - 1))
    count = xp.asarray([math.prod(x.shape[:-1])], dtype="float64")
    return xp.concatenate([*(v.sum(axis=axes, dtype="float64") for v in values), count])


@composite
def layer_norm(x: Array, gamma: Array, beta: Array, *, epsilon: float) -> Array:
    """Return `x` with mean 0 and variance 1 along its last axis, times `gamma`, plus `beta`.

    ``(x - mean) / sqrt(variance + epsilon) * gamma + beta``, the variance biased and formed in a second pass, so that
    a mean much larger than the spread costs no digits; float16 is computed as float32.

    Shapes: ``(..., n), (n,), (n,) -> (..., n)``.

    Source: Ba, Kiros & Hinton, "Layer normalization", 2016.
    """
    wide = cast(x, dtype="float32") if x.dtype == "float16" else x  # whose squares soon overflow
    centered = wide - mean_over(wide, axis=-1, keepdims=True)
    variance = mean_over(centered * centered, axis=-1, keepdims=True)
    y = centered / sqrt(variance + epsilon) * gamma + beta
    return cast(y, dtype=x.dtype) if x.dtype == "float16" else y


layer_norm.kernel(layer_kernels.layer_norm)
layer_norm.gradient(0).kernel(layer_kernels.layer_norm_input)
layer_norm.gradient(1, 2).kernel(layer_kernels.layer_norm_scale)
layer_norm.joined = each(0, inner=1)
layer_norm.gradient(0).joined = each(2, 0, 1, inner=1)
layer_norm.gradient(1, 2).joined = nowhere
