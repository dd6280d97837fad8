"""Pooling over windows and its gradients: cpu/pooling.cpp."""

import ctypes
import functools
from typing import Any

from disttrain.backend import Array
from disttrain.kernels.library import Launch, address, applies_to, native, new_array

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]


class _Windows(ctypes.Structure):
    """As in cpu/pooling.cpp."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            "images", "height", "width", "channels", "out_height", "out_width", "window_height", "window_width",
            "stride_down", "stride_across", "top", "left",
        )
    )  # fmt: skip


def max_pool2d(x: Array, **window: Any) -> Launch | None:
    """Compute what the op `max_pool2d` returns; None where it does not apply: see `disttrain.kernels`."""
    return _pooled("max_pool2d", x, **window)


def average_pool2d(x: Array, **window: Any) -> Launch | None:
    """Compute what the op `average_pool2d` returns; None where it does not apply: see `disttrain.kernels`."""
    return _pooled("average_pool2d", x, **window)


def put_at_maximum(
    g: Array, x: Array, *, size: Pair, strides: Pair, padding: Padding, out: Array | None = None
) -> Launch | None:
    """Compute what the op `_put_at_maximum` returns; None where it does not apply: see `disttrain.kernels`."""
    compute = native("put_at_maximum")
    if compute is None or not applies_to(g, x):
        return None
    described = _described(x.shape, (*size,), (*strides,), ((*padding[0],), (*padding[1],)))
    if described is None or described[1] != g.shape:
        return None
    out = new_array(x.shape, out)
    return Launch(compute, (ctypes.byref(described[0]), address(g), address(x), address(out)), out)


def spread(
    g: Array, *, shape: tuple[int, ...], size: Pair, strides: Pair, padding: Padding, out: Array | None = None
) -> Launch | None:
    """Compute what the op `_spread` returns; None where it does not apply: see `disttrain.kernels`."""
    compute = native("spread")
    if compute is None or not applies_to(g):
        return None
    described = _described((*shape,), (*size,), (*strides,), ((*padding[0],), (*padding[1],)))
    if described is None or described[1] != g.shape:
        return None
    out = new_array(shape, out)
    return Launch(compute, (ctypes.byref(described[0]), address(g), address(out)), out)


def _pooled(
    name: str, x: Array, *, size: Pair, strides: Pair, padding: Padding, out: Array | None = None
) -> Launch | None:
    compute = native(name)
    if compute is None or not applies_to(x):
        return None
    described = _described(x.shape, (*size,), (*strides,), ((*padding[0],), (*padding[1],)))
    if described is None:
        return None
    y = new_array(described[1], out)
    return Launch(compute, (ctypes.byref(described[0]), address(x), address(y)), y)


@functools.lru_cache(maxsize=256)
def _described(
    x: tuple[int, ...], size: Pair, strides: Pair, padding: Padding
) -> tuple[_Windows, tuple[int, ...]] | None:
    """Return how windows lie and the shape of the result, given shapes; None where no kernel applies."""
    if len(x) != 4 or min(*x[1:], *size, *strides) < 1 or min(side for pad in padding for side in pad) < 0:
        return None
    out = tuple(
        (length + sum(pad) - window) // stride + 1
        for length, window, stride, pad in zip(x[1:3], size, strides, padding, strict=True)
    )
    if min(out) < 1:
        return None
    return _Windows(*x, *out, *size, *strides, padding[0][0], padding[1][0]), (x[0], *out, x[3])
