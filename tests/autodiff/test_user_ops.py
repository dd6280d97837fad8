"""Ops of the user's own: how a right rule works, and what a wrong one is told."""

import numpy as np
import pytest

import disttrain as dt
from disttrain import Tensor, ops
from disttrain.errors import AutodiffError, ConfigError, GradientMismatchError


def made(rule):
    """Return an op that squares, with `rule`."""

    @dt.op
    def square(x):
        return x * x

    if rule is not None:
        square.vjp(rule)
    return square


def right(g, _y, x):
    return (2 * g * x,)


def test_an_op_with_a_rule_computes_records_and_is_differentiated_again():
    square = made(right)
    np.testing.assert_array_equal(square(np.array([3.0])), [9])
    dt.check_grads(square, np.array([[1.0, -2], [0.5, 3]]), order=3)


def test_an_op_with_attributes_and_several_arguments():
    @dt.op
    def scaled(x, w, *, by=1.0):
        return x * w * by

    @scaled.vjp
    def _(g, _y, x, w, *, by=1.0):
        return ops.multiply(g, w) * by, ops.multiply(g, x) * by

    dt.check_grads(lambda x, w: scaled(x, w, by=-3.0), np.ones((2, 3)), np.ones(3) * 2, order=2)
    dt.check_grads(scaled, np.ones(2), np.ones(2), order=2)


def test_rules_get_what_their_names_ask_for():
    got = {}

    @dt.op
    def three(a, b, c):
        return a + b + c

    @three.vjp
    def _(g, _y, a, _b, c, *, needs):
        got.update(y=_y, a=a, b=_b, c=c, needs=needs)
        return g, None, g

    a, c = (Tensor(np.array([n]), requires_grad=True) for n in (1.0, 3.0))
    three(a, np.array([2.0]), c).sum().backward()
    assert got == {"y": None, "a": 1, "b": None, "c": 3, "needs": (True, False, True)}


def test_rules_get_any_number_of_arguments():
    @dt.op
    def product(*xs):
        return np.multiply.reduce(np.stack(xs), axis=0)

    @product.vjp
    def _(g, y, *xs):
        return tuple(g * y / x for x in xs)

    dt.check_grads(product, *[np.array([1.5, -2.0]) for _ in range(4)], order=2)


def test_an_op_without_a_rule_is_a_named_error():
    with pytest.raises(AutodiffError, match=r"'square' has no gradient rule.*@square\.vjp"):
        made(None)(Tensor(np.ones(1), requires_grad=True)).backward()


def test_a_wrong_number_of_cotangents_is_a_named_error():
    square = made(lambda g, _y, x: (g * x, g))
    with pytest.raises(AutodiffError, match=r"'square' gave 2 cotangents for 1 array"):
        square(Tensor(np.ones(1), requires_grad=True)).backward()


@pytest.mark.parametrize("shape", [(1,), (), (3,), (2, 3), (4, 1)])
def test_a_cotangent_of_a_shape_that_does_not_fit_is_a_named_error(shape):
    square = made(lambda g, _y, _x: (np.ones(shape),))
    with pytest.raises(AutodiffError, match=r"'square' gave a cotangent of shape .* for an argument of shape \(2,\)"):
        square(Tensor(np.ones(2), requires_grad=True)).sum().backward()


def test_a_wrong_rule_is_found_at_the_place_of_its_error():
    def wrong(g, _y, x):
        factor = np.full(x.shape, 2.0)
        factor[1, 0] = 2.001
        return (g * x * factor,)

    with pytest.raises(GradientMismatchError, match=r"argument 0 at \(1, 0\)"):
        dt.check_grads(made(wrong), np.array([[1.0, 2], [3, 4]]))


def test_a_wrong_sign_of_a_second_argument_is_found():
    @dt.op
    def difference(a, b):
        return a - b

    @difference.vjp
    def _(g, _y, _a, _b):
        return g, g

    with pytest.raises(GradientMismatchError, match="argument 1"):
        dt.check_grads(difference, np.ones(2), np.ones(2))


def test_a_gradient_that_is_not_a_number_is_found():
    with pytest.raises(GradientMismatchError, match="nan"):
        dt.check_grads(made(lambda g, _y, x: (g * x * np.nan,)), np.ones(2))


def test_a_rule_that_is_right_once_but_cannot_be_differentiated_is_found_by_order_two():
    square = made(lambda g, _y, x: (2 * g * np.asarray(x),))  # forgets where x came from
    dt.check_grads(square, np.array([1.0, 2.0]))
    with pytest.raises(GradientMismatchError):
        dt.check_grads(square, np.array([1.0, 2.0]), order=2)


def test_check_grads_computes_in_float64():
    seen = set()

    def f(x):
        seen.add(x.dtype)
        return x * 2

    dt.check_grads(f, np.ones(2, np.float32))
    assert seen == {np.dtype("float64")}


def test_check_grads_of_order_zero_would_check_nothing():
    with pytest.raises(ConfigError, match="order"):
        dt.check_grads(ops.exp, np.ones(1), order=0)
