"""Attention, as composites of ops."""

import functools
import math
from typing import Any

import numpy as np

from disttrain.autodiff.composite import composite
from disttrain.autodiff.joining import Axes, Joined
from disttrain.autodiff.op import Recorded, array_of
from disttrain.autodiff.ops.elementwise import add, cast, multiply, subtract
from disttrain.autodiff.ops.matrix import matmul
from disttrain.autodiff.ops.shape import reshape, transpose
from disttrain.autodiff.ops.softmax import softmax
from disttrain.backend import Array, get_array_module
from disttrain.kernels import attention as kernels


def attention(query: Array, key: Array, value: Array, *, mask: Array | None = None, causal: bool = False) -> Array:
    """Return for each query the mean of the values, weighted by how well their keys match it.

    ``softmax(query @ key^T / sqrt(width)) @ value``.

    Shapes: ``(..., queries, width), (..., keys, width), (..., keys, n) -> (..., queries, n)``.

    Args:
        query: what is looked for.
        key: what each value is found by.
        value: what is averaged.
        mask: bool or integers that broadcast to ``(..., queries, keys)``: where it is 0 a query does not see a key.
            One that sees none gets a mean of all values, which means nothing.
        causal: whether a query sees the keys up to its own place only.

    Source: Vaswani et al., "Attention is all you need", 2017.
    """
    return matmul(attention_weights(query, key, mask=mask, causal=causal), value)


def attention_of_heads(
    query: Array, key: Array, value: Array, *, heads: int, mask: Array | None = None, causal: bool = False
) -> Array:
    """Return `attention` for each of `heads`, which lie side by side along the last axis.

    Shapes: ``(samples, queries, heads * width), (samples, keys, heads * width), (samples, keys, heads * n) ->
    (samples, queries, heads * n)``; arguments as of `attention`, `mask` broadcasts to
    ``(samples, heads, queries, keys)``.
    """
    if mask is not None and not isinstance(mask, Recorded):
        mask = get_array_module(array_of(query)).asarray(mask)
    return _attention_of_heads(query, key, value, mask, heads=heads, causal=causal)


@composite
def _attention_of_heads(query: Array, key: Array, value: Array, mask: Array, *, heads: int, causal: bool) -> Array:
    """Return what `attention_of_heads` does; the mask is an argument, so that a plan knows where it comes from."""
    query, key, value = (_apart(x, heads) for x in (query, key, value))
    y = transpose(attention(query, key, value, mask=mask, causal=causal), axes=(0, 2, 1, 3))
    return reshape(y, shape=(*y.shape[:2], y.shape[2] * y.shape[3]))


def _apart(x: Array, heads: int) -> Array:
    """Return heads that lie side by side on an axis of their own: ``(samples, heads, steps, width)``."""
    return transpose(reshape(x, shape=(*x.shape[:2], heads, x.shape[2] // heads)), axes=(0, 2, 1, 3))


def _flops(query: Array, key: Array, widths: int, causal: bool) -> int:
    """Return the operations of products that make or take `widths` numbers for each query and key that it sees."""
    seen = sum(min(i + 1, key.shape[1]) for i in range(query.shape[1])) if causal else query.shape[1] * key.shape[1]
    return 2 * int(query.shape[0]) * int(seen) * widths


_attention_of_heads.flops = lambda _made, query, key, value, *_mask, causal, **_: _flops(
    query, key, query.shape[2] + value.shape[2], causal
)
_attention_of_heads.gradient(0, 1, 2).flops = lambda _made, _g, _y, query, key, value, *_mask, causal, **_: _flops(
    query, key, 3 * query.shape[2] + 2 * value.shape[2], causal
)
_attention_of_heads.kernel(kernels.attention_of_heads)
_attention_of_heads.gradient(0, 1, 2).kernel(kernels.attention_of_heads_gradients)


def _joined(axes: Axes, made: Array, *given: Array, **_attributes: Any) -> Joined:
    """Return the rule's answer for samples that are joined; what comes last is the mask, which may be one for all."""
    *tensors, mask = given
    if any(axis not in (0, None) for axis in axes) or len(made.shape) != (3 if len(tensors) == 3 else 4):
        return None
    masked = 0 if mask is not None and len(mask.shape) == 4 and (axes[-1] == 0 or mask.shape[0] != 1) else None
    if axes[-1] is not None and masked is None:
        return None
    return len(made.shape) - 3, (*(None if x is None else 0 for x in tensors), masked)


_attention_of_heads.joined = _attention_of_heads.gradient(0, 1, 2).joined = _joined


def attention_weights(query: Array, key: Array, *, mask: Array | None = None, causal: bool = False) -> Array:
    """Return the weights that `attention` gives each value: along the keys they add up to 1.

    Shapes: ``(..., queries, width), (..., keys, width) -> (..., queries, keys)``; arguments as of `attention`.
    """
    scale = 1 / math.sqrt(query.shape[-1])
    axes = (*range(key.ndim - 2), key.ndim - 1, key.ndim - 2)
    scores = matmul(multiply(query, scale), transpose(key, axes=axes))
    dtype = str(scores.dtype)
    # added, not chosen by `where`: takes a tenth of the time, and exp gives 0 to the bit
    xp = get_array_module(array_of(scores))
    if mask is not None:
        mask = mask if isinstance(mask, Recorded) else xp.asarray(mask)
        scores = add(scores, multiply(subtract(1, cast(mask, dtype=dtype)), _unseen(dtype)))
    if causal:
        scores = add(scores, xp.asarray(_later(*scores.shape[-2:], dtype)))
    return softmax(scores)


def _unseen(dtype: str) -> float:
    """Return what is added to a score that is not to count; Keras's numbers."""
    return -3e4 if dtype == "float16" else -1e9


@functools.lru_cache(maxsize=16)
def _later(queries: int, keys: int, dtype: str) -> np.ndarray[Any, Any]:
    """Return what is added to scores where the key stands after the query."""
    later = np.triu(np.full((queries, keys), _unseen(dtype), dtype), 1)
    later.flags.writeable = False  # others hold it too
    return later
