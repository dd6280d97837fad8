"""Normalization, as composites of ops."""

from collections.abc import Callable

from disttrain.autodiff.composite import composite
from disttrain.autodiff.op import array_of, op
from disttrain.autodiff.ops.elementwise import cast, sqrt
from disttrain.autodiff.ops.reduction import mean as mean_over
from disttrain.autodiff.ops.reduction import sum
from disttrain.autodiff.ops.shape import concatenate, reshape
from disttrain.backend import Array, get_array_module
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


def batch_norm(x: Array, mean: Array, variance: Array, gamma: Array, beta: Array, *, epsilon: float) -> Array:
    """Return ``(x - mean) / sqrt(variance + epsilon) * gamma + beta``.

    Shapes: ``(..., channels)``, then four of ``(channels,) -> (..., channels)``.

    Source: Ioffe & Szegedy, "Batch normalization", 2015.
    """
    return (x - mean) * (gamma / sqrt(variance + epsilon)) + beta


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
