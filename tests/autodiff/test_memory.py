"""What lives how long: arrays until a rule has used them, graphs of any depth."""

import gc
import weakref

import numpy as np
import pytest

import disttrain as dt
from disttrain import Tensor, ops

DEPTH = 10_000  # ten times Python's limit of recursion


@pytest.fixture(autouse=True)
def _without_collector():
    """Let reference counts alone free memory: a cycle in the graph would keep it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@dt.op
def watched(x, *, seen):
    """Return the exponential, and keep a weak reference to it."""
    y = np.exp(x)
    seen.append(weakref.ref(y))
    return y


@watched.vjp
def _(g, y, _x, *, seen):
    # those made later, whose rules have run, are gone
    alive = [ref() is not None for ref in seen]
    at = next(i for i, ref in enumerate(seen) if ref() is y)
    seen.alive.append((at, alive))
    return (g * y,)


class Seen(list):
    def __init__(self):
        self.alive = []


def test_intermediate_arrays_are_dropped_as_backward_passes():
    seen = Seen()
    x = Tensor(np.full(3, 0.1), requires_grad=True)
    y = x
    for _ in range(4):
        y = watched(y, seen=seen) - 1
    loss = y.sum()
    del y
    assert all(ref() is not None for ref in seen)  # backward needs them
    loss.backward()
    assert [at for at, _ in seen.alive] == [3, 2, 1, 0]
    for at, alive in seen.alive:
        assert alive == [i <= at for i in range(4)]
    assert all(ref() is None for ref in seen)  # although `loss` lives


def test_retained_graphs_keep_their_arrays_until_they_are_dropped():
    seen = Seen()
    x = Tensor(np.full(3, 0.1), requires_grad=True)
    loss = watched(x, seen=seen).sum()
    loss.backward(retain_graph=True)
    assert seen[0]() is not None
    del loss
    assert seen[0]() is None


def test_arrays_that_no_rule_needs_are_dropped_at_once():
    seen = Seen()
    x = Tensor(np.full(3, 0.1))
    y = watched(x, seen=seen) + Tensor(np.ones(3), requires_grad=True)  # a sum needs neither of its arguments
    assert seen[0]() is None
    y.sum().backward()


def test_no_grad_keeps_nothing():
    seen = Seen()
    with dt.no_grad():
        y = watched(Tensor(np.full(3, 0.1), requires_grad=True), seen=seen) * 2
    assert seen[0]() is None
    assert not y.requires_grad


def test_graphs_deeper_than_the_stack_are_differentiated():
    x = Tensor(np.ones(2), requires_grad=True)
    y = x
    for _ in range(DEPTH):
        y = y + x
    y.sum().backward()
    np.testing.assert_array_equal(x.grad, [DEPTH + 1] * 2)


def test_graphs_deeper_than_the_stack_are_deleted():
    seen = Seen()
    x = Tensor(np.zeros(2), requires_grad=True)
    y = watched(x, seen=seen)
    for _ in range(DEPTH):
        y = y * x
    assert seen[0]() is not None
    del y
    assert seen[0]() is None


def test_gradients_of_gradients_of_deep_graphs():
    def deep(x):
        y = x
        for _ in range(DEPTH // 10):
            y = y * 1.0
        return (y * y * y).sum()

    point = Tensor(np.array([2.0]), requires_grad=True)
    second = dt.grad(lambda x: dt.grad(deep)(x).sum())(point)
    np.testing.assert_array_equal(second.data, [12])


def test_an_op_does_not_change_or_keep_hold_of_its_arguments():
    before = np.arange(6.0).reshape(2, 3)
    x = Tensor(before.copy(), requires_grad=True)
    ref = weakref.ref(x)
    y = ops.softmax(x * 2 + 1).sum()
    y.backward()
    np.testing.assert_array_equal(x.data, before)
    del x
    assert ref() is None
    del y
