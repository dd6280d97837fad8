"""Two-dimensional convolution, channels last, and its two adjoints.

A convolution is linear in its input and in its kernel, so each of the three ops is the gradient of the
others: the family is closed, and gradients of gradients need nothing more.

On a CPU the patches of a few images at a time are copied to rows (im2col) and multiplied while they are in
the cache; a whole batch of patches would be kh * kw times the batch, and memory would bound it.
"""

import math
from collections.abc import Iterator
from typing import Any

from disttrain.autodiff.joining import each, nowhere
from disttrain.autodiff.op import op
from disttrain.autodiff.ops.elementwise import _where_positive
from disttrain.autodiff.ops.reduction import sum
from disttrain.backend import Array, get_array_module
from disttrain.errors import ShapeError, unknown_name
from disttrain.kernels import convolution

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]  # (top, bottom), (left, right)

_CACHE_BYTES = 1 << 20  # of patches at a time: about the L2 cache of a core


@op
def conv2d(
    x: Array, kernel: Array, bias: Array = None, *, strides: Pair = (1, 1), padding: Padding,
    activation: str | None = None,
) -> Array:  # fmt: skip
    """Return the cross-correlation of `x` with `kernel`, as deep learning calls convolution.

    Shapes: ``(n, h, w, c), (kh, kw, c, filters), (filters,) -> (n, oh, ow, filters)``,
    ``oh = (h + top + bottom - kh) // strides[0] + 1``, and `ow` likewise.

    Args:
        x: images.
        kernel: as often as there are filters, a window.
        bias: added to each place; or None.
        strides: steps of the window, down and across.
        padding: ``(top, bottom), (left, right)``, zeros around each image.
        activation: None, or ``"relu"``, applied last: with the bias in the same pass over memory.
    """
    xp = get_array_module(x)
    kh, kw, channels, filters = kernel.shape
    if x.ndim != 4 or x.shape[3] != channels:
        raise ShapeError(
            f"conv2d: an input of shape {x.shape} for a kernel of shape {kernel.shape}; expected "
            f"(samples, height, width, {channels})"
        )
    if bias is not None and bias.shape != (filters,):
        raise ShapeError(f"conv2d: a bias of shape {bias.shape} for {filters} filters; expected ({filters},)")
    if activation not in (None, "relu"):
        raise unknown_name("activation of conv2d", activation, ["relu"])
    oh, ow = output_size(x.shape[1:3], (kh, kw), strides, padding)
    y = xp.empty((x.shape[0], oh, ow, filters), xp.result_type(*(a for a in (x, kernel, bias) if a is not None)))
    flat = kernel.reshape(-1, filters)
    for part, rows in _patches(x, (kh, kw), (oh, ow), strides, padding):
        xp.matmul(rows, flat, out=y[part].reshape(-1, filters))
    if bias is not None:
        y += bias
    if activation == "relu":
        xp.maximum(y, 0, out=y)
    return y


@op
def conv2d_input(g: Array, kernel: Array, *, size: Pair, strides: Pair = (1, 1), padding: Padding) -> Array:
    """Return the adjoint of `conv2d` in its input, also called transposed convolution.

    Shapes: ``(n, oh, ow, filters), (kh, kw, c, filters) -> (n, *size, c)``.
    """
    xp = get_array_module(g)
    kh, kw, channels, filters = kernel.shape
    n, oh, ow, _ = g.shape
    (top, bottom), (left, right) = padding
    height, width = size[0] + top + bottom, size[1] + left + right
    padded = xp.zeros((n, height, width, channels), xp.result_type(g, kernel))
    transposed = kernel.reshape(-1, filters).T
    step = _images_at_a_time(xp, n, oh * ow * kh * kw * channels * padded.itemsize)
    for start in range(0, n, step):
        part = padded[start : start + step]
        rows = g[start : start + step].reshape(-1, filters) @ transposed
        patches = rows.reshape(-1, oh, ow, kh, kw, channels)
        for i, j, window in _shifts((kh, kw), (oh, ow), strides):
            part[window] += patches[:, :, :, i, j]
    return padded[:, top : height - bottom, left : width - right]


@op
def conv2d_kernel(x: Array, g: Array, *, size: Pair, strides: Pair = (1, 1), padding: Padding) -> Array:
    """Return the adjoint of `conv2d` in its kernel.

    Shapes: ``(n, h, w, c), (n, oh, ow, filters) -> (*size, c, filters)``.
    """
    xp = get_array_module(x)
    channels, filters = x.shape[-1], g.shape[-1]
    total = xp.zeros((size[0] * size[1] * channels, filters), xp.result_type(x, g))
    for part, rows in _patches(x, size, g.shape[1:3], strides, padding):
        total += rows.T @ g[part].reshape(-1, filters)
    return total.reshape(*size, channels, filters)


conv2d.kernel(convolution.conv2d)
conv2d_input.kernel(convolution.conv2d_input)
conv2d_kernel.kernel(convolution.conv2d_kernel)
conv2d.joined = conv2d_input.joined = each(0, inner=3)
conv2d_kernel.joined = nowhere


def _flops(y: Array, kernel: Array) -> int:
    """Return the operations of the definition, of whatever the result and in however few products it is computed."""
    return 2 * int(y.size) * int(kernel.size) // int(kernel.shape[3])


conv2d.flops = lambda made, _x, kernel, *_bias, **_attributes: _flops(made, kernel)
conv2d_input.flops = lambda _made, g, kernel, **_attributes: _flops(g, kernel)
conv2d_kernel.flops = lambda made, _x, g, **_attributes: _flops(g, made)


@conv2d.vjp
def _(
    g: Array, y: Array, x: Array, kernel: Array, *_bias: Array, strides: Pair = (1, 1), padding: Padding,
    activation: str | None = None, needs: tuple[bool, ...],
) -> tuple[Array, ...]:  # fmt: skip
    if activation == "relu":
        g = _where_positive(g, y)
    size = kernel.shape[:2]
    return (
        conv2d_input(g, kernel, size=x.shape[1:3], strides=strides, padding=padding)
        if needs[0] else None,
        conv2d_kernel(x, g, size=size, strides=strides, padding=padding) if needs[1] else None,
        *(sum(g, axis=(0, 1, 2)) if need else None for need in needs[2:]),
    )  # fmt: skip


@conv2d_input.vjp
def _(
    h: Array, _y: Array, g: Array, kernel: Array, *, size: Pair, strides: Pair = (1, 1),
    padding: Padding,
) -> tuple[Array, ...]:  # fmt: skip
    return (
        conv2d(h, kernel, strides=strides, padding=padding),
        conv2d_kernel(h, g, size=kernel.shape[:2], strides=strides, padding=padding),
    )


@conv2d_kernel.vjp
def _(
    h: Array, _y: Array, x: Array, g: Array, *, size: Pair, strides: Pair = (1, 1),
    padding: Padding,
) -> tuple[Array, ...]:  # fmt: skip
    return (
        conv2d_input(g, h, size=x.shape[1:3], strides=strides, padding=padding),
        conv2d(x, h, strides=strides, padding=padding),
    )


def output_size(size: Pair, window: Pair, strides: Pair, padding: Padding) -> Pair:
    """Return how often a `window` fits into ``(h, w)`` with its `padding`; less than 1 is never."""
    (top, bottom), (left, right) = padding
    return (
        (size[0] + top + bottom - window[0]) // strides[0] + 1,
        (size[1] + left + right - window[1]) // strides[1] + 1,
    )


def same_padding(size: Pair, window: Pair, strides: Pair) -> Padding:
    """Return the padding with which ``ceil(size / strides)`` windows fit, the odd one at the end.

    Source: Keras and TensorFlow, padding="same".
    """
    (a, b), (c, d) = (
        (max((-(-n // s) - 1) * s + k - n, 0) // 2, -(-max((-(-n // s) - 1) * s + k - n, 0) // 2))
        for n, k, s in zip(size, window, strides, strict=True)
    )
    return (a, b), (c, d)


def _shifts(window: Pair, output: Pair, strides: Pair) -> Iterator[tuple[int, int, Any]]:
    """Yield each place in the window, with the index of what all windows hold there."""
    for i in range(window[0]):
        for j in range(window[1]):
            rows = slice(i, i + (output[0] - 1) * strides[0] + 1, strides[0])
            columns = slice(j, j + (output[1] - 1) * strides[1] + 1, strides[1])
            yield i, j, (slice(None), rows, columns)


def _patches(x: Array, window: Pair, output: Pair, strides: Pair, padding: Padding) -> Iterator[tuple[slice, Array]]:
    """Yield, for a few images at a time, which they are and their patches as rows.

    Rows: shape ``(images * oh * ow, kh * kw * c)``; overwritten by the next ones.
    """
    xp = get_array_module(x)
    channels = x.shape[-1]
    if any(side for pair in padding for side in pair):
        x = xp.pad(x, ((0, 0), *padding, (0, 0)))
    length = window[0] * window[1] * channels
    step = _images_at_a_time(xp, x.shape[0], math.prod(output) * length * x.itemsize)
    rows = xp.empty((step, *output, *window, channels), x.dtype)
    n, h, w, c = x.strides
    for start in range(0, x.shape[0], step):
        images = x[start : start + step]
        held = rows[: images.shape[0]]
        held[...] = xp.lib.stride_tricks.as_strided(images, held.shape, (n, h * strides[0], w * strides[1], h, w, c))
        yield slice(start, start + step), held.reshape(-1, length)


def _images_at_a_time(xp: Any, images: int, bytes_each: int) -> int:
    """Return how many images' patches fit into the cache; on a GPU, and for an empty batch, all."""
    if xp.__name__ != "numpy" or bytes_each == 0:
        return max(images, 1)
    return max(1, min(images, _CACHE_BYTES // bytes_each))
