"""Ops with random numbers: counter-based, so that they do not depend on which rank holds a sample."""

import math

from disttrain.autodiff.op import array_of
from disttrain.backend import Array, get_array_module, sample_bits


def dropout(x: Array, *, rate: float, key: tuple[int | str, ...], first: int = 0) -> Array:
    """Return `x` with a share `rate` of its elements set to 0, the others divided by ``1 - rate``.

    Args:
        x: shape ``(samples, ...)``.
        rate: from 0 to below 1.
        key: what the mask is for, such as ``(seed, layer, step)``.
        first: place of the first sample in the global batch; a sample's mask depends on `key` and its place.

    Source: Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", 2014.
    """
    per_sample = math.prod(x.shape[1:])
    bits = sample_bits(*key, first=first, samples=x.shape[0], per_sample=per_sample)
    kept = (bits >= round(rate * 2**32)).reshape(x.shape)
    xp = get_array_module(array_of(x))
    return x * xp.asarray(kept / (1 - rate), dtype=x.dtype)
