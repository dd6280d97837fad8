"""Convolution in two dimensions and its adjoints: cpu/convolution.cpp, cpu/convolution_kernel.cpp, cpu/winograd.cpp."""

import ctypes
import functools

from disttrain.backend import Array
from disttrain.kernels.library import Launch, address, applies_to, native, new_array

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]

_FEWEST = 4  # channels of a result: they share a vector, which with fewer is mostly idle
_DEEP = 16  # channels and filters from which on Winograd's products pay, measured
_MOST_PRODUCTS = 0.8  # of the definition's: tiles that reach beyond small images save fewer


class _Geometry(ctypes.Structure):
    """As in cpu/grid.h."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            "images", "height", "width", "channels", "kernel_height", "kernel_width", "filters", "out_height",
            "out_width", "stride_down", "stride_across", "top", "left",
        )
    )  # fmt: skip


def conv2d(
    x: Array, kernel: Array, bias: Array | None = None, *, strides: Pair = (1, 1), padding: Padding,
    activation: str | None = None, out: Array | None = None,
) -> Launch | None:  # fmt: skip
    """Compute what the op `conv2d` returns; None where it does not apply: see `disttrain.kernels`."""
    if not applies_to(x, kernel) or activation not in (None, "relu"):
        return None
    described = _described(x.shape, kernel.shape, (*strides,), ((*padding[0],), (*padding[1],)))
    if described is None or kernel.shape[3] < _FEWEST:
        return None
    geometry, shape = described
    if bias is not None and (not applies_to(bias) or bias.shape != shape[3:]):
        return None
    compute = native("winograd" if winograd_pays(geometry) else "conv2d")
    if compute is None:
        return None
    y = new_array(shape, out)
    added = None if bias is None else address(bias)
    args = ctypes.byref(geometry), address(x), address(kernel), added, activation == "relu", address(y)
    return Launch(compute, args, y)


def conv2d_input(
    g: Array, kernel: Array, *, size: Pair, strides: Pair = (1, 1), padding: Padding, out: Array | None = None
) -> Launch | None:
    """Compute what the op `conv2d_input` returns; None where it does not apply: see `disttrain.kernels`."""
    if not applies_to(g, kernel) or g.ndim != 4 or kernel.ndim != 4 or kernel.shape[2] < _FEWEST:
        return None
    shape = (g.shape[0], *size, kernel.shape[2])
    described = _described(shape, kernel.shape, (*strides,), ((*padding[0],), (*padding[1],)))
    if described is None or described[1] != g.shape:
        return None
    compute = native("winograd_input" if winograd_pays(described[0]) else "conv2d_input")
    if compute is None:
        return None
    x = new_array(shape, out)
    return Launch(compute, (ctypes.byref(described[0]), address(g), address(kernel), address(x)), x)


def conv2d_kernel(
    x: Array, g: Array, *, size: Pair, strides: Pair = (1, 1), padding: Padding, out: Array | None = None
) -> Launch | None:
    """Compute what the op `conv2d_kernel` returns; None where it does not apply: see `disttrain.kernels`."""
    if not applies_to(x, g) or x.ndim != 4 or g.ndim != 4 or g.shape[3] < _FEWEST:
        return None
    shape = (*size, x.shape[3], g.shape[3])
    described = _described(x.shape, shape, (*strides,), ((*padding[0],), (*padding[1],)))
    if described is None or described[1] != g.shape:
        return None
    compute = native("winograd_kernel" if winograd_pays(described[0]) else "conv2d_kernel")
    if compute is None:
        return None
    kernel = new_array(shape, out)
    return Launch(compute, (ctypes.byref(described[0]), address(x), address(g), address(kernel)), kernel)


def winograd_applies(geometry: _Geometry) -> bool:
    """Return whether cpu/winograd.cpp can compute a convolution: one of windows of 3 x 3 and strides of 1."""
    window = geometry.kernel_height, geometry.kernel_width, geometry.stride_down, geometry.stride_across
    return bool(window == (3, 3, 1, 1))


def winograd_pays(geometry: _Geometry) -> bool:
    """Return whether it is the faster one: with few channels, transforms cost more than products that are saved.

    The number of images is not asked for: an image's results have the same bits in any batch.
    """
    if not winograd_applies(geometry) or min(geometry.channels, geometry.filters) < _DEEP:
        return False
    places = geometry.out_height * geometry.out_width
    tiles = -(-geometry.out_height // 2) * -(-geometry.out_width // 2)
    return bool(16 * tiles < _MOST_PRODUCTS * 9 * places)


@functools.lru_cache(maxsize=256)
def _described(
    x: tuple[int, ...], kernel: tuple[int, ...], strides: Pair, padding: Padding
) -> tuple[_Geometry, tuple[int, ...]] | None:
    """Return a convolution's geometry and the shape of its result, given shapes; None where no kernel applies."""
    if len(x) != 4 or len(kernel) != 4 or x[3] != kernel[2] or min(*x[1:], *kernel, *strides) < 1:
        return None
    out = tuple(
        (length + sum(pad) - window) // stride + 1
        for length, window, stride, pad in zip(x[1:3], kernel[:2], strides, padding, strict=True)
    )
    if min(out) < 1 or min(side for pad in padding for side in pad) < 0:
        return None
    geometry = _Geometry(*x, *kernel[:2], kernel[3], *out, *strides, padding[0][0], padding[1][0])
    return geometry, (x[0], *out, kernel[3])
