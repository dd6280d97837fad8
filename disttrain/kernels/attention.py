"""Attention of heads side by side and its gradients: cpu/attention.cpp."""

import ctypes
from typing import Any

import numpy as np

from disttrain.backend import Array
from disttrain.kernels.library import Launch, address, applies_to, native, new_array


class _Attention(ctypes.Structure):
    """As in cpu/attention.cpp."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            "samples", "heads", "queries", "keys", "width", "value_width", "causal", "mask_item", "mask_sample",
            "mask_head", "mask_query", "mask_key",
        )
    )  # fmt: skip


def attention_of_heads(
    query: Array, key: Array, value: Array, mask: Array, *, heads: int, causal: bool, out: Array | None = None
) -> Launch | None:
    """Compute what the op `attention_of_heads` returns; None where it does not apply: see `disttrain.kernels`."""
    compute = native("attention")
    if compute is None or not applies_to(query, key, value):
        return None
    described = _described(query.shape, key.shape, value.shape, mask, heads, causal)
    if described is None:
        return None
    out = new_array((*query.shape[:2], value.shape[2]), out)
    args = ctypes.byref(described), *map(address, (query, key, value)), _address(mask), address(out)
    return Launch(compute, args, out)


def attention_of_heads_gradients(
    g: Array, _y: Array, query: Array, key: Array, value: Array, mask: Array, *, heads: int, causal: bool,
    out: Array | None = None,
) -> Launch | None:  # fmt: skip
    """Compute the gradients of `attention_of_heads` in query, key and value; None where it does not apply."""
    compute = native("attention_gradients")
    if compute is None or not applies_to(g, query, key, value):
        return None
    described = _described(query.shape, key.shape, value.shape, mask, heads, causal)
    if described is None or g.shape != (*query.shape[:2], value.shape[2]):
        return None
    alike = query.shape == key.shape == value.shape
    out = new_array((3, *query.shape) if alike else (query.size + key.size + value.size,), out)
    at = address(out)
    places = at, at + query.nbytes, at + query.nbytes + key.nbytes
    args = ctypes.byref(described), *map(address, (g, query, key, value)), _address(mask), *places
    return Launch(compute, args, out)


def _address(mask: Array) -> int | None:
    return None if mask is None else address(mask)


def _described(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], mask: Array, heads: int, causal: bool
) -> Any:
    """Return how arrays of these shapes and `mask` lie; None where no kernel applies."""
    if not len(query) == len(key) == len(value) == 3:
        return None
    samples, queries, width = query
    if key != (samples, key[1], width) or value[:2] != key[:2] or heads < 1 or width % heads or value[2] % heads:
        return None
    if min(queries, key[1], width, value[2]) < 1:
        return None
    steps: tuple[int, ...] = (0,) * 5
    if mask is not None:
        if type(mask) is not np.ndarray or mask.dtype not in (bool, np.int32, np.int64) or not mask.flags.aligned:
            return None
        try:
            steps = mask.itemsize, *np.broadcast_to(mask, (samples, heads, queries, key[1])).strides
        except ValueError:
            return None
    return _Attention(samples, heads, queries, key[1], width // heads, value[2] // heads, causal, *steps)
