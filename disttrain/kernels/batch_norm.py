"""Batch normalization, the sums that it is made of, and its gradient: cpu/batch_norm.cpp."""

import math

import numpy as np

from disttrain.backend import Array
from disttrain.kernels.library import Launch, address, applies_to, native, new_array


def batch_norm(
    x: Array, mean: Array, variance: Array, gamma: Array, beta: Array, *, epsilon: float, out: Array | None = None
) -> Launch | None:
    """Compute what the op `batch_norm` returns; None where it does not apply: see `disttrain.kernels`."""
    compute = native("batch_norm")
    channels = mean, variance, gamma, beta
    if compute is None or not applies_to(x, *channels) or not _fit(x, *channels):
        return None
    out = new_array(x.shape, out)
    return Launch(compute, (*_rows(x), address(x), *map(address, channels), epsilon, address(out)), out)


def channel_sums(x: Array, *, out: Array | None = None) -> Launch | None:
    """Compute what the op `_channel_sums` returns; None where it does not apply."""
    return _sums("channel_sums", 1, (x,), (), out)


def square_sums(x: Array, mean: Array, *, out: Array | None = None) -> Launch | None:
    """Compute what the op `_square_sums` returns; None where it does not apply."""
    return _sums("square_sums", 1, (x,), (mean,), out)


def cotangent_sums(g: Array, x: Array, mean: Array, *, out: Array | None = None) -> Launch | None:
    """Compute what the op `_cotangent_sums` returns; None where it does not apply."""
    return _sums("cotangent_sums", 2, (g, x), (mean,), out)


def batch_norm_input(
    g: Array, x: Array, mean: Array, variance: Array, gamma: Array, sums: Array, *, epsilon: float,
    out: Array | None = None,
) -> Launch | None:  # fmt: skip
    """Compute what the op `_batch_norm_input` returns; None where it does not apply."""
    compute = native("batch_norm_input")
    channels = mean, variance, gamma
    if compute is None or not applies_to(g, x, *channels) or not _fit(x, *channels) or g.shape != x.shape:
        return None
    if type(sums) is not np.ndarray or sums.dtype != np.float64 or not sums.flags.c_contiguous:
        return None
    out = new_array(x.shape, out)
    given = (*map(address, (g, x, *channels)), address(sums))
    return Launch(compute, (*_rows(x), *given, epsilon, address(out)), out)


def _sums(
    name: str, each: int, values: tuple[Array, ...], channels: tuple[Array, ...], out: Array | None
) -> Launch | None:  # fmt: skip
    """Return the launch of `each` sums for each channel of `values`, arrays of one shape."""
    compute = native(name)
    if compute is None or not applies_to(*values, *channels) or not _fit(values[0], *channels):
        return None
    if any(a.shape != values[0].shape for a in values):
        return None
    out = np.empty(each * values[0].shape[-1] + 1) if out is None else out
    return Launch(compute, (*_rows(values[0]), *map(address, (*values, *channels)), address(out)), out)


def _fit(x: Array, *channels: Array) -> bool:
    """Return whether each of `channels` has one number for each channel of `x`, and there are some."""
    return x.ndim > 0 and x.shape[-1] > 0 and all(a.shape == x.shape[-1:] for a in channels)


def _rows(x: Array) -> tuple[int, int]:
    return math.prod(x.shape[:-1]), x.shape[-1]
