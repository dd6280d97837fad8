"""Matrix products."""

from disttrain.autodiff.joining import Axes, Joined, each
from disttrain.autodiff.op import op
from disttrain.autodiff.ops.elementwise import _where_positive
from disttrain.autodiff.ops.shape import reshape, transpose
from disttrain.backend import Array, get_array_module
from disttrain.errors import unknown_name
from disttrain.kernels import matmul as kernels


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


_matmul.kernel(kernels.matmul)


@_matmul.vjp
def _(g: Array, _y: Array, a: Array, b: Array, *, needs: tuple[bool, ...]) -> tuple[Array, ...]:
    return _of_factors(g, a, b, needs)


@op
def dense(x: Array, kernel: Array, bias: Array | None, *, activation: str | None = None) -> Array:
    """Return ``activation(x @ kernel + bias)`` in one pass.

    Shapes: ``(..., n), (n, units), (units,) -> (..., units)``.

    Args:
        x: two axes or more.
        kernel: a matrix.
        bias: None for none.
        activation: None or ``"relu"``.

    Raises:
        ConfigError: `activation` is another one.
    """
    if activation not in (None, "relu"):
        raise unknown_name("activation of dense", activation, ["None", "relu"])
    y = _matmul.definition(x, kernel)
    y = y if bias is None else y + bias
    return y if activation is None else get_array_module(y).maximum(y, 0)


dense.kernel(kernels.dense)


@dense.vjp
def _(
    g: Array, y: Array, x: Array, kernel: Array, _bias: Array, *, activation: str | None = None, needs: tuple[bool, ...]
) -> tuple[Array, ...]:
    if activation is not None:
        g = _where_positive(g, y)
    gx, gk = _of_factors(g, x, kernel, needs)
    return gx, gk, g


def _of_factors(g: Array, a: Array, b: Array, needs: tuple[bool, ...]) -> tuple[Array, Array]:
    """Return the cotangents of the factors of a product, None where one is not needed."""
    ga = _matmul(g, _swap(b)) if needs[0] else None
    if not needs[1]:
        return ga, None
    if a.ndim > 2 and b.ndim == 2:
        a = reshape(a, shape=(-1, a.shape[-1]))
        g = reshape(g, shape=(-1, g.shape[-1]))
    return ga, _matmul(_swap(a), g)


def _joined(axes: Axes, made: Array, a: Array, b: Array) -> Joined:
    if axes[1] is None:
        return each(0, inner=1)(axes, made, a, b) if len(b.shape) == 2 else None
    return each(0, 1, inner=2)(axes, made, a, b) if axes[0] == axes[1] and len(a.shape) == len(b.shape) else None


_matmul.joined = _joined
dense.joined = each(0, inner=1)


def _flops(made: Array, a: Array, *_others: Array, **_attributes: object) -> int:
    return 2 * int(made.size) * int(a.shape[-1])


_matmul.flops = dense.flops = _flops


def _swap(x: Array) -> Array:
    """Return `x` with its last two axes exchanged."""
    return transpose(x, axes=(*range(x.ndim - 2), x.ndim - 1, x.ndim - 2))
