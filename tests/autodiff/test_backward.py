"""Backward: what lands in `.grad`, what is delivered and when, and what is an error."""

import numpy as np
import pytest

import disttrain as dt
from disttrain import Tensor, ops
from disttrain.autodiff.backward import leaves
from disttrain.errors import AutodiffError, ShapeError


def leaf(*values, name=""):
    return Tensor(np.array(values, dtype=np.float64), requires_grad=True, name=name)


def deliveries(output, **options):
    """Return the names and gradients in the order in which `output.backward` delivers them."""
    got = []
    output.backward(deliver=lambda tensor, gradient: got.append((tensor.name, gradient.tolist())), **options)
    return got


def test_gradients_add_up_in_grad_until_it_is_none():
    x = leaf(1, 2)
    for count in (1, 2, 3):
        (x * x).sum().backward()
        np.testing.assert_array_equal(x.grad, count * 2 * x.data)
    x.grad = None
    x.sum().backward()
    np.testing.assert_array_equal(x.grad, [1, 1])


def test_grad_is_an_array_of_its_own():
    a, b = leaf(1, 2), leaf(3, 4)
    (a + b).sum().backward()
    a.grad *= 5
    np.testing.assert_array_equal(b.grad, [1, 1])


def test_a_leaf_used_by_many_calls_gets_the_sum():
    x = leaf(2, 3)
    (x * x * x + 5 * x - x / x).sum().backward()
    np.testing.assert_array_equal(x.grad, 3 * x.data**2 + 5)


def test_diamonds_count_every_way_once():
    x = leaf(1)
    y = x
    for _ in range(50):  # 2**50 ways; followed one by one they would never end
        y = y + y
    y.sum().backward()
    assert x.grad == 2.0**50


def test_a_leaf_is_its_own_gradient():
    x = leaf(7)
    x.backward(np.array([3.0]))
    np.testing.assert_array_equal(x.grad, [3])


def test_a_cotangent_weights_the_outputs():
    x = leaf(1, 2)
    (x * x).backward(np.array([10, 100]))
    np.testing.assert_array_equal(x.grad, [20, 400])
    (x * x).backward(Tensor(np.array([-10.0, -100])))
    np.testing.assert_array_equal(x.grad, [0, 0])


def test_only_what_requires_a_gradient_gets_one():
    x, y = leaf(1), Tensor(np.ones(1))
    (x * y + y.detach() * x.detach()).sum().backward()
    assert y.grad is None
    np.testing.assert_array_equal(x.grad, [1])


def test_retain_graph_allows_another_backward():
    x = leaf(3)
    y = (x * x).sum()
    y.backward(retain_graph=True)
    y.backward()
    np.testing.assert_array_equal(x.grad, [12])


def test_a_freed_graph_is_an_error_that_names_the_op():
    x = leaf(3)
    shared = ops.exp(x)
    (shared * 1).sum().backward()
    with pytest.raises(AutodiffError, match=r"'exp' was freed.*retain_graph=True"):
        (shared * 2).sum().backward()


def test_an_output_of_several_numbers_is_an_error_that_shows_its_shape():
    with pytest.raises(AutodiffError, match=r"shape \(2,\).*mean\(\)"):
        (leaf(1, 2) * 2).backward()


def test_a_cotangent_of_another_shape_is_an_error_that_shows_both():
    with pytest.raises(ShapeError, match=r"shape \(3,\) for a Tensor of shape \(2,\)"):
        (leaf(1, 2) * 2).backward(np.ones(3))


def test_backward_of_what_was_not_recorded_is_an_error():
    with pytest.raises(AutodiffError, match="requires no gradient"):
        Tensor(np.ones(1)).backward()
    with dt.no_grad():
        y = leaf(1) * 2
    with pytest.raises(AutodiffError, match="no_grad"):
        y.backward()


def test_integers_cannot_require_gradients():
    with pytest.raises(AutodiffError, match="int64"):
        Tensor(np.arange(3), requires_grad=True)


def test_each_leaf_is_delivered_once_in_the_order_of_their_last_uses():
    a, b, c = leaf(2, name="a"), leaf(3, name="b"), leaf(5, name="c")
    first = a * b
    second = first * c
    third = second + b
    # b is used first and last: backward has its whole gradient after `first` only, as it has a's
    assert deliveries(third.sum()) == [("c", [6.0]), ("a", [15.0]), ("b", [11.0])]


def test_a_leaf_is_delivered_before_earlier_calls_are_differentiated():
    """What lets its all-reduce start while backward goes on."""
    events = []

    @dt.op
    def noted(x, *, label):
        return x * 1

    @noted.vjp
    def _(g, _y, _x, *, label):
        events.append(f"rule {label}")
        return (g,)

    early, late = leaf(1, name="early"), leaf(2, name="late")
    y = noted(noted(early, label="first") * late, label="last")
    y.sum().backward(deliver=lambda tensor, _: events.append(tensor.name))
    assert events == ["rule last", "late", "rule first", "early"]


def test_delivered_gradients_are_final_and_leave_grad_alone():
    x = leaf(1, 2, name="x")
    y = (x * 3 + x[::-1] * x + ops.exp(x)).sum()
    assert deliveries(y) == [("x", [pytest.approx(3 + 4 + np.e), pytest.approx(3 + 2 + np.e**2)])]
    assert x.grad is None


def test_a_leaf_behind_ways_without_gradient_is_delivered_as_zeros():
    x, y = leaf(1, 2, name="x"), leaf(1, name="y")
    steps = ops.cast(x, dtype="int64")
    assert deliveries((ops.cast(steps, dtype="float64") * y).sum()) == [("y", [3.0]), ("x", [0.0, 0.0])]


def test_leaves_are_those_that_are_delivered():
    a, b, unused = leaf(1, name="a"), leaf(2, name="b"), leaf(3, name="unused")
    _ = unused * 2
    y = (a * b + a).sum()
    assert sorted(tensor.name for tensor in leaves(y)) == ["a", "b"]
    assert sorted(name for name, _ in deliveries(y)) == ["a", "b"]
