"""A composite's kernels compute where they apply; where they do not, and for gradients of gradients, its ops do."""

import numpy as np
import pytest

from disttrain import Tensor, check_grads, ops
from disttrain.autodiff.composite import composite
from disttrain.autodiff.plan import Plan
from disttrain.autodiff.trace import Trace
from disttrain.kernels.library import Launch
from tests.autodiff.test_plan import nowhere, step_of


@pytest.fixture
def launches():
    """Return the names of the kernels that were run, in order."""
    return []


@pytest.fixture
def scaled(launches):
    """Return a composite, ``(x - a * b) * factor``, with kernels for arrays in C order."""

    @composite
    def scaled(x, a, b, *, factor):
        return (x - a * b) * factor

    def kernel(name, compute, arrays, out):
        if not all(type(a) is np.ndarray and a.flags.c_contiguous for a in arrays):
            return None

        def run(out):
            launches.append(name)
            out[...] = compute()

        made = np.empty_like(np.asarray(compute())) if out is None else out
        return Launch(run, (made,), made)

    @scaled.kernel
    def _(x, a, b, *, factor, out=None):
        return kernel("forward", lambda: (x - a * b) * factor, (x, a, b), out)

    @scaled.gradient(0).kernel
    def _(g, _y, x, _a, _b, *, factor, out=None):
        return kernel("x", lambda: g * factor, (g, x), out)

    @scaled.gradient(1, 2).kernel
    def _(g, _y, _x, a, b, *, factor, out=None):
        return kernel("a, b", lambda: np.stack([-g * b * factor, -g * a * factor]), (g, a, b), out)

    return scaled


def arrays():
    return list(np.random.default_rng(0).standard_normal((3, 2, 5)))


def test_kernels_compute_forward_and_backward(scaled, launches):
    tensors = [Tensor(a, requires_grad=True) for a in arrays()]
    y = scaled(*tensors, factor=3.0)
    assert y.call.op is scaled
    y.backward(np.ones((2, 5)))
    assert launches == ["forward", "x", "a, b"]
    x, a, b = arrays()
    np.testing.assert_array_equal(y.numpy(), (x - a * b) * 3)
    for tensor, expected in zip(tensors, (np.full((2, 5), 3.0), -3 * b, -3 * a), strict=True):
        np.testing.assert_allclose(tensor.grad, expected, rtol=1e-15)


def test_only_gradients_that_are_needed_are_computed(scaled, launches):
    x, a, b = arrays()
    scaled(Tensor(x, requires_grad=True), a, b, factor=3.0).sum().backward()
    scaled(x, a, Tensor(b, requires_grad=True), factor=3.0).backward(np.ones((2, 5)))
    assert launches == ["forward", "forward", "a, b"]  # the cotangent of a sum is no array in C order


def test_a_rule_for_all_arguments_serves_unless_its_gradient_is_asked_for(scaled, launches):
    asked = []

    @scaled.pull
    def _(g, _y, x, a, b, *, factor, needs):
        asked.append(needs)
        return (g * factor, *(-g * other * factor if needed else None for other, needed in ((b, needs[1]), (a, False))))

    x, a, b = arrays()
    tensors = [Tensor(v, requires_grad=True) for v in (x, a)]
    scaled(*tensors, b, factor=3.0).backward(np.ones((2, 5)))
    np.testing.assert_array_equal(tensors[0].grad, np.full((2, 5), 3.0))
    np.testing.assert_allclose(tensors[1].grad, -3 * b, rtol=1e-15)
    assert asked == [(True, True, False)]
    assert launches == ["forward"]
    check_grads(lambda *args: scaled(*args, b, factor=0.5) ** 2, x, a, order=2)


def test_of_groups_that_hold_an_argument_the_one_is_taken_that_computes_only_what_is_needed(scaled, launches):
    @scaled.gradient(2).kernel
    def _(g, _y, x, a, _b, *, factor, out=None):
        made = np.empty(a.shape) if out is None else out

        def run(made):
            launches.append("b")
            made[...] = -g * a * factor

        return Launch(run, (made,), made)

    x, a, b = arrays()
    for needs in ((False, True, True), (False, False, True), (False, True, False)):
        args = [Tensor(v, requires_grad=need) for v, need in zip((x, a, b), needs, strict=True)]
        scaled(*args, factor=3.0).backward(np.ones((2, 5)))
        assert [t.grad is not None for t in args] == list(needs)
    assert launches == ["forward", "a, b", "forward", "b", "forward", "a, b"]


def test_where_the_kernel_does_not_apply_the_ops_are_recorded(scaled, launches):
    x, a, b = arrays()
    y = scaled(Tensor(np.asfortranarray(x), requires_grad=True), a, b, factor=3.0)
    assert y.call.op is ops.multiply
    y.backward(np.ones((2, 5)))
    assert launches == []


def test_gradients_of_any_order_with_kernels_and_without(scaled, launches):
    check_grads(lambda *args: scaled(*args, factor=0.5) ** 2, *arrays(), order=2)
    assert {"forward", "x", "a, b"} <= set(launches)
    check_grads(lambda x: scaled(x, x, x, factor=0.5) ** 2, arrays()[0], order=2)
    check_grads(lambda *args: scaled(*args, factor=0.5) ** 2, *map(np.asfortranarray, arrays()), order=2)


def test_an_argument_whose_gradient_has_no_kernel_gets_it_by_the_definition():
    @composite
    def product(a, b):
        return a * b

    @product.kernel
    def _(a, b, *, out=None):
        made = np.empty_like(a) if out is None else out
        return Launch(np.multiply, (a, b, made), made)

    a, b = (Tensor(v, requires_grad=True) for v in arrays()[:2])
    y = product(a, b)
    assert y.call.op is product
    y.sum().backward()
    np.testing.assert_array_equal(a.grad, b.data)
    np.testing.assert_array_equal(b.grad, a.data)
    check_grads(product, *arrays()[:2], order=2)


def test_gradients_of_several_arguments_of_different_shapes_come_in_one_flat_array():
    @composite
    def product(a, b):
        return a @ b

    launches = []

    @product.kernel
    def _(a, b, *, out=None):
        made = np.empty((2, 3)) if out is None else out
        return Launch(np.matmul, (a, b, made), made)

    @product.gradient(0, 1).kernel
    def _(g, _y, a, b, *, out=None):
        made = np.empty(a.size + b.size) if out is None else out

        def run(made):
            launches.append("a, b")
            made[: a.size] = (g @ b.T).ravel()
            made[a.size :] = (a.T @ g).ravel()

        return Launch(run, (made,), made)

    generator = np.random.default_rng(1)
    arrays = [generator.standard_normal((2, 5)), generator.standard_normal((5, 3))]
    a, b = (Tensor(v, requires_grad=True) for v in arrays)
    g = np.arange(6.0).reshape(2, 3)
    product(a, b).backward(g)
    assert launches == ["a, b"]
    np.testing.assert_array_equal(a.grad, g @ arrays[1].T)
    np.testing.assert_array_equal(b.grad, arrays[0].T @ g)
    check_grads(lambda a, b: product(a, b) ** 2, *arrays, order=2)


def test_the_output_is_kept_only_for_a_kernel_that_asks_for_it():
    @composite
    def doubled(x):
        return x * 2

    @doubled.fused
    def _(x):
        return x * 2

    assert doubled(Tensor(np.ones(3), requires_grad=True)).call.output is None

    @doubled.gradient(0).fused
    def _(g, y, x):
        assert (y == 2 * x).all()
        return g * 2

    x = Tensor(np.ones(3), requires_grad=True)
    doubled(x).sum().backward()
    np.testing.assert_array_equal(x.grad, [2, 2, 2])


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_plan_launches_the_same_kernels_with_the_same_bits(scaled, launches, order):
    step = step_of(lambda x, a, b: scaled(x, a, b, factor=3.0))
    args = [np.array(a, order=order) for a in arrays()]
    traces = []
    for _ in range(2):
        traces.append(Trace(args, []))
        with traces[-1].running() as results:
            results.extend(step(*args))
    assert traces[0].difference(traces[1]) == ""
    plan = Plan(traces[1], home=nowhere, final=nowhere)
    for scale in (0.75, 1.0):
        others = [np.array(a * scale, order=order) for a in arrays()]
        launches.clear()
        got = [a.copy() for a in plan.run(others)]
        planned = launches.copy()
        launches.clear()
        for mine, expected in zip(got, step(*others), strict=True):
            np.testing.assert_array_equal(mine, expected)
        assert planned == launches == (["forward", "x", "a, b"] if order == "C" else [])
