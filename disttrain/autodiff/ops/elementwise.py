"""Elementwise ops. Arguments broadcast as in NumPy; backward sums a cotangent to its argument's shape itself."""

from typing import Any

import numpy as np

from disttrain.autodiff.joining import elementwise, nowhere
from disttrain.autodiff.op import Op, op
from disttrain.autodiff.ops.shape import sum_to
from disttrain.backend import Array, get_array_module
from disttrain.kernels import elementwise as kernels


@op
def add(a: Array, b: Array) -> Array:
    """Return ``a + b``."""
    return a + b


@add.vjp
def _(g: Array, _y: Array, _a: Array, _b: Array) -> tuple[Array, ...]:
    return g, g


@op
def subtract(a: Array, b: Array) -> Array:
    """Return ``a - b``."""
    return a - b


@subtract.vjp
def _(g: Array, _y: Array, _a: Array, _b: Array, *, needs: tuple[bool, ...]) -> tuple[Array, ...]:
    # summed to the shape of `b` first, while it is not negated yet: often that is a mean
    return g, -sum_to(g, shape=_b.shape) if needs[1] else None


@op
def multiply(a: Array, b: Array) -> Array:
    """Return ``a * b``."""
    return a * b


@multiply.vjp
def _(g: Array, _y: Array, a: Array, b: Array, *, needs: tuple[bool, ...]) -> tuple[Array, ...]:
    return g * b if needs[0] else None, g * a if needs[1] else None


@op
def divide(a: Array, b: Array) -> Array:
    """Return ``a / b``."""
    return a / b


@divide.vjp
def _(g: Array, y: Array, _a: Array, b: Array, *, needs: tuple[bool, ...]) -> tuple[Array, ...]:
    over = g / b
    return over, -over * y if needs[1] else None


@op
def negative(x: Array) -> Array:
    """Return ``-x``."""
    return -x


@negative.vjp
def _(g: Array, _y: Array, _x: Array) -> tuple[Array, ...]:
    return (-g,)


@op
def power(x: Array, exponent: Array) -> Array:
    """Return ``x ** exponent``. The gradient of `exponent` needs positive `x`."""
    return x**exponent


@power.vjp
def _(g: Array, y: Array, x: Array, exponent: Array, *, needs: tuple[bool, ...]) -> tuple[Array, ...]:
    return (
        # an exponent of 0 stays 0: at x = 0 its gradient would be 0 * inf
        g * exponent * x ** (exponent - not_equal(exponent, 0)) if needs[0] else None,
        g * y * log(x) if needs[1] else None,
    )


@op
def exp(x: Array) -> Array:
    """Return e to the power of `x`."""
    return get_array_module(x).exp(x)


@exp.vjp
def _(g: Array, y: Array, _x: Array) -> tuple[Array, ...]:
    return (g * y,)


@op
def log(x: Array) -> Array:
    """Return the natural logarithm of `x`."""
    return get_array_module(x).log(x)


@log.vjp
def _(g: Array, _y: Array, x: Array) -> tuple[Array, ...]:
    return (g / x,)


@op
def log1p(x: Array) -> Array:
    """Return ``log(1 + x)``, exact for small `x`."""
    return get_array_module(x).log1p(x)


@log1p.vjp
def _(g: Array, _y: Array, x: Array) -> tuple[Array, ...]:
    return (g / (1 + x),)


@op
def sqrt(x: Array) -> Array:
    """Return the square root of `x`."""
    return get_array_module(x).sqrt(x)


@sqrt.vjp
def _(g: Array, y: Array, _x: Array) -> tuple[Array, ...]:
    return (g / (2 * y),)


@op
def abs(x: Array) -> Array:
    """Return the absolute value of `x`; its gradient at 0 is 0."""
    return get_array_module(x).abs(x)


@abs.vjp
def _(g: Array, _y: Array, x: Array) -> tuple[Array, ...]:
    return (g * sign(x),)


@op
def sign(x: Array) -> Array:
    """Return -1, 0 or 1, the sign of `x`."""
    return get_array_module(x).sign(x)


@sign.vjp
def _(g: Array, _y: Array, _x: Array) -> tuple[Array, ...]:
    return (g * 0,)


@op
def maximum(a: Array, b: Array) -> Array:
    """Return the larger of `a` and `b`; at a tie each gets half of the gradient."""
    return get_array_module(a, b).maximum(a, b)


@maximum.vjp
def _(g: Array, _y: Array, a: Array, b: Array) -> tuple[Array, ...]:
    share = _share(g, a, b)
    return g * share, g * (1 - share)


@op
def minimum(a: Array, b: Array) -> Array:
    """Return the smaller of `a` and `b`; at a tie each gets half of the gradient."""
    return get_array_module(a, b).minimum(a, b)


@minimum.vjp
def _(g: Array, _y: Array, a: Array, b: Array) -> tuple[Array, ...]:
    share = _share(g, a, b)
    return g * (1 - share), g * share


def _share(g: Array, a: Array, b: Array) -> Array:
    """Return 1 where `a` is larger than `b`, 0 where it is smaller, 1/2 where they are equal; of the dtype of `g`."""
    # not from a - b, which overflows, or is inf - inf
    return cast(add(greater(a, b), multiply(equal(a, b), 0.5)), dtype=g.dtype)


@op
def clip(x: Array, *, low: float, high: float) -> Array:
    """Return `x` limited to ``[low, high]``; outside the gradient is 0."""
    return x.clip(low, high)


@clip.vjp
def _(g: Array, _y: Array, x: Array, *, low: float, high: float) -> tuple[Array, ...]:
    return (where(greater_equal(x, low), where(less_equal(x, high), g, 0), 0),)


@op
def tanh(x: Array) -> Array:
    """Return the hyperbolic tangent of `x`."""
    return get_array_module(x).tanh(x)


@tanh.vjp
def _(g: Array, y: Array, _x: Array) -> tuple[Array, ...]:
    return (g * (1 - y * y),)


@op
def sigmoid(x: Array) -> Array:
    """Return ``1 / (1 + exp(-x))``."""
    with np.errstate(over="ignore"):  # exp(-x) may be inf, and 1 / inf is the right limit
        return 1 / (1 + get_array_module(x).exp(-x))


@sigmoid.vjp
def _(g: Array, y: Array, x: Array) -> tuple[Array, ...]:  # x is kept for losses: see `argument_of`
    return (g * y * (1 - y),)


@op
def relu(x: Array) -> Array:
    """Return ``max(x, 0)``; its gradient at 0 is 0."""
    return get_array_module(x).maximum(x, 0)


@relu.vjp
def _(g: Array, y: Array, _x: Array) -> tuple[Array, ...]:
    return (_where_positive(g, y),)


@op
def _where_positive(g: Array, y: Array) -> Array:
    """Return `g` where `y` is positive, elsewhere 0."""
    return g * (y > 0)


_where_positive.kernel(kernels.where_positive)


@_where_positive.vjp
def _(h: Array, _z: Array, _g: Array, y: Array) -> tuple[Array, ...]:
    return _where_positive(h, y), None


@op
def where(condition: Array, a: Array, b: Array) -> Array:
    """Return `a` where `condition` holds, else `b`."""
    return get_array_module(condition).where(condition, a, b)


@where.vjp
def _(g: Array, _y: Array, condition: Array, _a: Array, _b: Array) -> tuple[Array, ...]:
    return None, where(condition, g, 0), where(condition, 0, g)


@op
def cast(x: Array, *, dtype: str) -> Array:
    """Return `x` as `dtype`: rounding to integers has no gradient.

    Backward casts every cotangent to its argument's dtype itself.
    """
    return x.astype(dtype)


@cast.vjp
def _(g: Array, _y: Array, _x: Array, *, dtype: str) -> tuple[Array, ...]:
    return (g if np.dtype(dtype).kind == "f" else None,)


@op
def equal(a: Array, b: Array) -> Array:
    """Return where `a` is equal to `b`, as bool; without gradient."""
    return a == b


@equal.vjp
def _(_g: Array, _y: Array, _a: Array, _b: Array) -> tuple[Array, ...]:
    return None, None


@op
def not_equal(a: Array, b: Array) -> Array:
    """Return where `a` differs from `b`, as bool; without gradient."""
    return a != b


@not_equal.vjp
def _(_g: Array, _y: Array, _a: Array, _b: Array) -> tuple[Array, ...]:
    return None, None


@op
def less(a: Array, b: Array) -> Array:
    """Return where `a` is less than `b`, as bool; without gradient."""
    return a < b


@less.vjp
def _(_g: Array, _y: Array, _a: Array, _b: Array) -> tuple[Array, ...]:
    return None, None


@op
def less_equal(a: Array, b: Array) -> Array:
    """Return where `a` is at most `b`, as bool; without gradient."""
    return a <= b


@less_equal.vjp
def _(_g: Array, _y: Array, _a: Array, _b: Array) -> tuple[Array, ...]:
    return None, None


@op
def greater(a: Array, b: Array) -> Array:
    """Return where `a` is greater than `b`, as bool; without gradient."""
    return a > b


@greater.vjp
def _(_g: Array, _y: Array, _a: Array, _b: Array) -> tuple[Array, ...]:
    return None, None


@op
def greater_equal(a: Array, b: Array) -> Array:
    """Return where `a` is at least `b`, as bool; without gradient."""
    return a >= b


@greater_equal.vjp
def _(_g: Array, _y: Array, _a: Array, _b: Array) -> tuple[Array, ...]:
    return None, None


for _op, _ufunc in (
    (add, np.add),
    (subtract, np.subtract),
    (multiply, np.multiply),
    (divide, np.divide),
    (negative, np.negative),
    (exp, np.exp),
    (log, np.log),
    (log1p, np.log1p),
    (sqrt, np.sqrt),
    (abs, np.abs),
    (sign, np.sign),
    (maximum, np.maximum),
    (minimum, np.minimum),
    (tanh, np.tanh),
    (equal, np.equal),
    (not_equal, np.not_equal),
    (less, np.less),
    (less_equal, np.less_equal),
    (greater, np.greater),
    (greater_equal, np.greater_equal),
):
    _op.into(_ufunc)


_EXACT: tuple[Op[Any], ...] = (
    add, subtract, multiply, divide, negative, sqrt, abs, sign, maximum, minimum, clip, relu, _where_positive, where,
    cast, equal, not_equal, less, less_equal, greater, greater_equal,
)  # fmt: skip
_ROUNDED: tuple[Op[Any], ...] = (power, exp, log, log1p, tanh, sigmoid)  # perhaps otherwise at an array's end

for _each in _EXACT:
    _each.joined = elementwise
for _each in _ROUNDED:
    _each.joined = nowhere


@relu.into
def _(x: Array, out: Array) -> None:
    np.maximum(x, 0, out=out)


relu.is_elementwise = True  # the above may write over `x`


@sigmoid.into
def _(x: Array, out: Array) -> None:
    with np.errstate(over="ignore"):
        np.exp(np.negative(x, out), out)
    np.divide(1, np.add(1, out, out), out)


@cast.into
def _(x: Array, out: Array, *, dtype: str) -> None:
    np.copyto(out, x, casting="unsafe")
