"""Pooling over windows, channels last: the same few lines for each place in the window, over all windows at once."""

from collections.abc import Iterator
from typing import Any

from disttrain.autodiff.joining import each, nowhere
from disttrain.autodiff.op import array_of, op
from disttrain.autodiff.ops.conv import Padding, Pair, _shifts, output_size
from disttrain.backend import Array, get_array_module
from disttrain.kernels import pooling


@op
def max_pool2d(x: Array, *, size: Pair, strides: Pair, padding: Padding) -> Array:
    """Return the maximum of each window; padding never wins.

    Shapes: ``(n, h, w, c) -> (n, oh, ow, c)``. Of equal values the first gets the gradient.
    """
    xp = get_array_module(x)
    padded = _pad(x, padding, -xp.inf)
    slices = (padded[at] for at in _places(x.shape, size, strides, padding))
    y = next(slices).copy()
    for values in slices:
        xp.maximum(y, values, out=y)
    return y


max_pool2d.kernel(pooling.max_pool2d)


@max_pool2d.vjp
def _(g: Array, _y: Array, x: Array, *, size: Pair, strides: Pair, padding: Padding) -> tuple[Array, ...]:
    return (_put_at_maximum(g, array_of(x), size=size, strides=strides, padding=padding),)


@op
def _put_at_maximum(g: Array, x: Array, *, size: Pair, strides: Pair, padding: Padding) -> Array:
    """Return zeros like `x` with each window's `g` added where the window's maximum is."""
    xp = get_array_module(x)
    padded = _pad(x, padding, -xp.inf)
    out = xp.zeros(padded.shape, g.dtype)
    for at, first in _maxima(padded, x.shape, size, strides, padding):
        out[at] += g * first
    return _crop(out, padding)


_put_at_maximum.kernel(pooling.put_at_maximum)


@_put_at_maximum.vjp
def _(h: Array, _y: Array, _g: Array, x: Array, **window: Any) -> tuple[Array, ...]:
    return _pick_at_maximum(h, x, **window), None


@op
def _pick_at_maximum(h: Array, x: Array, *, size: Pair, strides: Pair, padding: Padding) -> Array:
    """Return, for each window, `h` at the place of the maximum of `x`."""
    values = _pad(h, padding, 0)
    padded = _pad(x, padding, -get_array_module(x).inf)
    out: Array = 0
    for at, first in _maxima(padded, x.shape, size, strides, padding):
        out = out + values[at] * first
    return out


@_pick_at_maximum.vjp
def _(g: Array, _y: Array, _h: Array, x: Array, **window: Any) -> tuple[Array, ...]:
    return _put_at_maximum(g, x, **window), None


@op
def average_pool2d(x: Array, *, size: Pair, strides: Pair, padding: Padding) -> Array:
    """Return the mean of each window, over the elements that are not padding.

    Shapes: ``(n, h, w, c) -> (n, oh, ow, c)``.
    """
    padded = _pad(x, padding, 0)
    total: Array = 0
    for at in _places(x.shape, size, strides, padding):
        total = total + padded[at]
    return total / _counts(x, x.shape, size, strides, padding)


average_pool2d.kernel(pooling.average_pool2d)


@average_pool2d.vjp
def _(g: Array, _y: Array, _x: Array, **window: Any) -> tuple[Array, ...]:
    return (_spread(g, shape=_x.shape, **window),)


@op
def _spread(g: Array, *, shape: tuple[int, ...], size: Pair, strides: Pair, padding: Padding) -> Array:
    """Return the adjoint of `average_pool2d` for inputs of `shape`."""
    out = _pad(get_array_module(g).zeros(shape, g.dtype), padding, 0)
    share = g / _counts(g, shape, size, strides, padding)
    for at in _places(shape, size, strides, padding):
        out[at] += share
    return _crop(out, padding)


_spread.kernel(pooling.spread)


@_spread.vjp
def _(h: Array, _y: Array, _g: Array, *, shape: tuple[int, ...], **window: Any) -> tuple[Array, ...]:
    return (average_pool2d(h, **window),)


max_pool2d.joined = average_pool2d.joined = _spread.joined = each(0, inner=3)
_put_at_maximum.joined = each(0, 1, inner=3)
_pick_at_maximum.joined = nowhere


def _places(shape: tuple[int, ...], size: Pair, strides: Pair, padding: Padding) -> Iterator[Any]:
    """Yield, for each place in the window, the index of what all windows hold there."""
    output = output_size((shape[1], shape[2]), size, strides, padding)
    return (at for _, _, at in _shifts(size, output, strides))


def _maxima(
    padded: Array, shape: tuple[int, ...], size: Pair, strides: Pair, padding: Padding
) -> Iterator[tuple[Any, Array]]:
    """Yield, for each place in the window, its index and where the window's (first) maximum is there."""
    xp = get_array_module(padded)
    places = list(_places(shape, size, strides, padding))
    y = padded[places[0]].copy()
    for at in places[1:]:
        xp.maximum(y, padded[at], out=y)
    free = xp.ones(y.shape, bool)
    for at in places:
        first = (padded[at] == y) & free
        free ^= first
        yield at, first


def _counts(like: Array, shape: tuple[int, ...], size: Pair, strides: Pair, padding: Padding) -> Array:
    """Return how many elements of each window are not padding, shape ``(oh, ow, 1)``, of the dtype of `like`."""
    ones = _pad(get_array_module(like).ones((1, *shape[1:3], 1), like.dtype), padding, 0)
    places = _places(shape, size, strides, padding)
    return sum(ones[at] for at in places)[0]


def _pad(x: Array, padding: Padding, value: float) -> Array:
    if not any(side for pair in padding for side in pair):
        return x
    return get_array_module(x).pad(x, ((0, 0), *padding, (0, 0)), constant_values=value)


def _crop(x: Array, padding: Padding) -> Array:
    (top, bottom), (left, right) = padding
    return x[:, top : x.shape[1] - bottom, left : x.shape[2] - right]
