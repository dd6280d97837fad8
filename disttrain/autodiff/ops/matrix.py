"""Matrix products."""

import numpy as np

from disttrain.autodiff.op import op
from disttrain.autodiff.ops.shape import reshape, transpose
from disttrain.backend import Array


def matmul(a: Array, b: Array) -> Array:
    """Return the matrix product, as NumPy's ``a @ b``.

    Shapes: ``(..., m, k), (..., k, n) -> (..., m, n)``; a vector counts as a row (left) or a column (right).
    """
    if a.ndim > 1 and b.ndim > 1:
        return _matmul(a, b)
    left = a if a.ndim > 1 else reshape(a, shape=(1, -1))
    right = b if b.ndim > 1 else reshape(b, shape=(-1, 1))
    y = _matmul(left, right)
    shape = y.shape if a.ndim > 1 else (*y.shape[:-2], y.shape[-1])
    return reshape(y, shape=shape if b.ndim > 1 else shape[:-1])


@op
def _matmul(a: Array, b: Array) -> Array:
    if a.ndim > 2 and b.ndim == 2:  # one large product instead of a loop over small ones
        return (a.reshape(-1, a.shape[-1]) @ b).reshape(*a.shape[:-1], b.shape[-1])
    return a @ b


@_matmul.into
def _(a: Array, b: Array, out: Array) -> None:
    if a.ndim > 2 and b.ndim == 2 and a.flags.c_contiguous:
        a, out = a.reshape(-1, a.shape[-1]), out.reshape(-1, out.shape[-1])
    np.matmul(a, b, out)


@_matmul.vjp
def _(g: Array, _y: Array, a: Array, b: Array, *, needs: tuple[bool, ...]) -> tuple[Array, ...]:
    ga = _matmul(g, _swap(b)) if needs[0] else None
    if not needs[1]:
        return ga, None
    if a.ndim > 2 and b.ndim == 2:
        a = reshape(a, shape=(-1, a.shape[-1]))
        g = reshape(g, shape=(-1, g.shape[-1]))
    return ga, _matmul(_swap(a), g)


def _swap(x: Array) -> Array:
    """Return `x` with its last two axes exchanged."""
    return transpose(x, axes=(*range(x.ndim - 2), x.ndim - 1, x.ndim - 2))
