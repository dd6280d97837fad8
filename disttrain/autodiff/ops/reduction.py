"""Sums, means and maxima over axes; `axis` is None (all), a number or a tuple, as in NumPy."""

from disttrain.autodiff.joining import reduced
from disttrain.autodiff.op import op
from disttrain.autodiff.ops.elementwise import cast, equal
from disttrain.autodiff.ops.shape import broadcast_to, reshape
from disttrain.backend import Array

Axis = int | tuple[int, ...] | None


@op
def sum(x: Array, *, axis: Axis = None, keepdims: bool = False, dtype: str | None = None) -> Array:
    """Return the sum of `x` over `axis`, formed in `dtype`: by default that of `x`."""
    return x.sum(axis=axis, keepdims=keepdims, dtype=dtype)


@sum.vjp
def _(
    g: Array, _y: Array, _x: Array, *, axis: Axis = None, keepdims: bool = False, dtype: str | None = None
) -> tuple[Array, ...]:
    if g.dtype != _x.dtype:
        g = cast(g, dtype=_x.dtype)  # while it is small
    return (broadcast_to(_with_axes(g, _x, axis, keepdims), shape=_x.shape),)


@sum.into
def _(x: Array, out: Array, *, axis: Axis = None, keepdims: bool = False, dtype: str | None = None) -> None:
    x.sum(axis=axis, keepdims=keepdims, dtype=dtype, out=out)


@op
def mean(x: Array, *, axis: Axis = None, keepdims: bool = False) -> Array:
    """Return the arithmetic mean of `x` over `axis`."""
    return x.mean(axis=axis, keepdims=keepdims)


@mean.vjp
def _(g: Array, _y: Array, _x: Array, *, axis: Axis = None, keepdims: bool = False) -> tuple[Array, ...]:
    count = _x.size // g.size if g.size else 1
    return (broadcast_to(_with_axes(g, _x, axis, keepdims) / count, shape=_x.shape),)


@mean.into
def _(x: Array, out: Array, *, axis: Axis = None, keepdims: bool = False) -> None:
    x.mean(axis=axis, keepdims=keepdims, out=out)


@op
def max(x: Array, *, axis: Axis = None, keepdims: bool = False) -> Array:
    """Return the largest value of `x` over `axis`; equal ones share the gradient."""
    return x.max(axis=axis, keepdims=keepdims)


@max.vjp
def _(g: Array, y: Array, x: Array, *, axis: Axis = None, keepdims: bool = False) -> tuple[Array, ...]:
    largest = equal(x, _with_axes(y, x, axis, keepdims))
    share = cast(largest / sum(largest, axis=axis, keepdims=True), dtype=x.dtype)
    return (_with_axes(g, x, axis, keepdims) * share,)


sum.joined = mean.joined = max.joined = reduced


def _with_axes(y: Array, x: Array, axis: Axis, keepdims: bool) -> Array:
    """Return the reduced `y` with its axes of length 1 back, so that it broadcasts against `x`."""
    if keepdims:
        return y
    axes = range(x.ndim) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    gone = {a % x.ndim for a in axes}
    return reshape(y, shape=tuple(1 if i in gone else n for i, n in enumerate(x.shape)))
