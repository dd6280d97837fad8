"""Ops with random numbers: counter-based, so that they do not depend on which rank holds a sample."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from disttrain.autodiff.joining import each
from disttrain.autodiff.op import op
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
    return x * mask_like(x, rate=rate, draw=partial(sample_bits, *key, first=first))


@op
def mask_like(x: Array, *, rate: float, draw: Callable[..., Any]) -> Array:
    """Return what `dropout` multiplies an array of the shape and dtype of `x` by: 0 and ``1 / (1 - rate)``.

    Its bits are those of ``draw(samples=..., per_sample=...)``, called when this runs.
    """
    bits = draw(samples=x.shape[0], per_sample=math.prod(x.shape[1:]))
    kept = (bits >= round(rate * 2**32)).reshape(x.shape)
    return get_array_module(x).asarray(kept / (1 - rate), dtype=x.dtype)


@mask_like.vjp
def _(_g: Array, _y: Array, _x: Array, *, rate: float, draw: Callable[..., Any]) -> tuple[Array, ...]:
    return (None,)


mask_like.is_placed = True
mask_like.joined = lambda axes, *given, **attributes: each(0)(axes, *given) if axes == (0,) else None
