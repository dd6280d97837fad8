"""Ops that move elements without computing: reshape, transpose, broadcast, join, pick."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from disttrain.autodiff import joining
from disttrain.autodiff.op import array_of, op
from disttrain.backend import Array, get_array_module
from disttrain.kernels import rows as kernels

Shape = tuple[int, ...]


@op
def reshape(x: Array, *, shape: Shape) -> Array:
    """Return `x` in another `shape`, in which one length may be -1."""
    return x.reshape(shape)


@reshape.into
def _(x: Array, out: Array, *, shape: Shape) -> None:
    np.copyto(out.reshape(x.shape), x)  # where no view is possible


@reshape.vjp
def _(g: Array, _y: Array, _x: Array, *, shape: Shape) -> tuple[Array, ...]:
    return (reshape(g, shape=_x.shape),)


@op
def transpose(x: Array, *, axes: Shape | None = None) -> Array:
    """Return `x` with its axes in the order `axes`; reversed when None."""
    return x.transpose(axes)


@transpose.vjp
def _(g: Array, _y: Array, _x: Array, *, axes: Shape | None = None) -> tuple[Array, ...]:
    if axes is None:
        return (transpose(g),)
    inverse = sorted(range(len(axes)), key=lambda i: axes[i] % len(axes))
    return (transpose(g, axes=tuple(inverse)),)


@op
def flip(x: Array, *, axis: int) -> Array:
    """Return `x` with the elements along `axis` in reverse, in memory of its own: kernels read it."""
    return get_array_module(x).flip(x, axis).copy()


@flip.into
def _(x: Array, out: Array, *, axis: int) -> None:
    np.copyto(out, np.flip(x, axis))


@flip.vjp
def _(g: Array, _y: Array, _x: Array, *, axis: int) -> tuple[Array, ...]:
    return (flip(g, axis=axis),)


@op
def broadcast_to(x: Array, *, shape: Shape) -> Array:
    """Return `x` repeated to `shape` by NumPy's rules; a read-only view."""
    return get_array_module(x).broadcast_to(x, shape)


@broadcast_to.vjp
def _(g: Array, _y: Array, _x: Array, *, shape: Shape) -> tuple[Array, ...]:
    return (sum_to(g, shape=_x.shape),)


@op
def sum_to(x: Array, *, shape: Shape) -> Array:
    """Return `x` summed over the axes along which `shape` was broadcast: what undoes `broadcast_to`."""
    added = x.ndim - len(shape)
    axes = tuple(range(added)) + tuple(i + added for i, n in enumerate(shape) if n == 1 and x.shape[i + added] != 1)
    return x.sum(axis=axes).reshape(shape) if axes else x


sum_to.kernel(kernels.sum_to)


@sum_to.vjp
def _(g: Array, _y: Array, _x: Array, *, shape: Shape) -> tuple[Array, ...]:
    return (broadcast_to(g, shape=_x.shape),)


def concatenate(arrays: Sequence[Array], axis: int = 0) -> Array:
    """Return `arrays` joined along an existing `axis`."""
    return _concatenate(*arrays, axis=axis)


def stack(arrays: Sequence[Array], axis: int = 0) -> Array:
    """Return `arrays`, all of one shape, joined along a new `axis`."""
    at = axis % (arrays[0].ndim + 1)
    return _concatenate(*[reshape(a, shape=(*a.shape[:at], 1, *a.shape[at:])) for a in arrays], axis=at)


@op
def _concatenate(*arrays: Array, axis: int) -> Array:
    return get_array_module(arrays[0]).concatenate(arrays, axis)


@_concatenate.into
def _(*arrays: Array, out: Array, axis: int) -> None:
    np.concatenate(arrays, axis, out=out)


@_concatenate.vjp
def _(g: Array, _y: Array, *arrays: Array, axis: int) -> tuple[Array, ...]:
    parts, start = [], 0
    for array in arrays:
        end = start + array.shape[axis]
        index = [slice(None)] * array.ndim
        index[axis] = slice(start, end)
        parts.append(getitem(g, index=tuple(index)))
        start = end
    return tuple(parts)


@op
def getitem(x: Array, *, index: Any) -> Array:
    """Return ``x[index]`` for any index that NumPy takes; a view for slices."""
    return x[_plain(index)]


@getitem.vjp
def _(g: Array, _y: Array, _x: Array, *, index: Any) -> tuple[Array, ...]:
    return (scatter_add(g, index=index, shape=_x.shape),)


@op
def scatter_add(g: Array, *, index: Any, shape: Shape) -> Array:
    """Return zeros of `shape` with `g` added at `index`, once for every time a place is named."""
    xp = get_array_module(g)
    out = xp.zeros(shape, g.dtype)
    _add_at(out, _plain(index), g)
    return out


def _add_at(out: Array, index: Any, g: Array) -> None:
    """Add `g` to zeros at `index`."""
    parts = index if isinstance(index, tuple) else (index,)
    if all(p is None or p is Ellipsis or isinstance(p, int | slice) for p in parts):
        out[index] = g
    else:  # an array may name a place twice
        get_array_module(out).add.at(out, index, g)


@scatter_add.into
def _(g: Array, out: Array, *, index: Any, shape: Shape) -> None:
    out[...] = 0
    _add_at(out, _plain(index), g)


@scatter_add.vjp
def _(g: Array, _y: Array, _x: Array, *, index: Any, shape: Shape) -> tuple[Array, ...]:
    return (getitem(g, index=index),)


@op
def pick(x: Array, index: Array) -> Array:
    """Return one element of each vector along the last axis: the one that `index` names.

    Shapes: ``(..., n), (...) -> (...)``; `index` holds integers from 0 to ``n - 1``.
    """
    xp = get_array_module(x)
    return xp.take_along_axis(x, xp.asarray(index)[..., None], -1)[..., 0]


@pick.vjp
def _(g: Array, _y: Array, _x: Array, index: Array) -> tuple[Array, ...]:
    return place(g, index, length=_x.shape[-1]), None


@op
def place(g: Array, index: Array, *, length: int) -> Array:
    """Return vectors of zeros with one element each set, the one that `index` names: the adjoint of `pick`.

    Shapes: ``(...), (...) -> (..., length)``.
    """
    xp = get_array_module(g)
    out = xp.zeros((*g.shape, length), g.dtype)
    xp.put_along_axis(out, xp.asarray(index)[..., None], g[..., None], -1)
    return out


@place.vjp
def _(h: Array, _y: Array, _g: Array, index: Array, *, length: int) -> tuple[Array, ...]:
    return pick(h, index), None


def _plain(index: Any) -> Any:
    """Return `index` with the arrays of Tensors in place of the Tensors."""
    if isinstance(index, tuple):
        return tuple(_plain(part) for part in index)
    return array_of(index)


for _op in (reshape, transpose, broadcast_to, sum_to, getitem):
    _op.may_view = True

reshape.joined = joining.reshaped
flip.joined = joining.beside
transpose.joined = joining.transposed
broadcast_to.joined = joining.broadcast
sum_to.joined = joining.nowhere
getitem.joined = joining.picked
scatter_add.joined = joining.put
_concatenate.joined = joining.beside
pick.joined = joining.each(0, 1, inner=1)
place.joined = joining.each(0, 1)
