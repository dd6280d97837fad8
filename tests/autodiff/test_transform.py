"""grad and value_and_grad: of several arguments, of gradients, with arrays and with Tensors."""

import numpy as np
import pytest

import disttrain as dt
from disttrain import Tensor, ops
from disttrain.errors import AutodiffError

# an indefinite matrix, not symmetric
A = np.array([[2.0, 1, 0], [-3, 1, 5], [0, 4, -1]])


def quadratic(x):
    return (x * (A @ x)).sum()


def test_arrays_in_arrays_out():
    x = np.array([1.0, -2, 3])
    value, gradient = dt.value_and_grad(quadratic)(x)
    assert not isinstance(value, Tensor)
    assert type(gradient) is np.ndarray
    assert value == x @ A @ x
    np.testing.assert_array_equal(gradient, (A + A.T) @ x)  # whole numbers: exact


def test_gradients_are_arrays_of_their_own():
    a, b = dt.grad(lambda a, b: (a + b).sum(), (0, 1))(np.zeros(2), np.zeros(2))
    a *= 5
    np.testing.assert_array_equal(b, [1, 1])


def test_tensors_in_tensors_out_that_can_be_differentiated_again():
    x = Tensor(np.array([1.0, -2, 3]), requires_grad=True)
    value, gradient = dt.value_and_grad(quadratic)(x)
    assert isinstance(value, Tensor)
    np.testing.assert_array_equal(gradient.data, (A + A.T) @ x.data)
    (gradient * gradient).sum().backward(retain_graph=True)  # `value` shares its graph
    np.testing.assert_array_equal(x.grad, 2 * (A + A.T) @ ((A + A.T) @ x.data))
    x.grad = None
    value.backward()
    np.testing.assert_array_equal(x.grad, gradient.data)


def test_hessian_vector_products_are_the_formulas():
    """The Hessian of sum(exp(x)) + (b.x)**4 / 12 is diag(exp(x)) + (b.x)**2 b b'."""
    b = np.array([1.0, -1, 2])

    def f(x):
        return ops.exp(x).sum() + (x * b).sum() ** 4 / 12

    def product(x, v):
        return dt.grad(lambda x: (dt.grad(f)(x) * v).sum())(x)

    x, v = Tensor(np.array([0.5, -1, 0.25]), requires_grad=True), np.array([3.0, -1, 2])
    hessian = np.diag(np.exp(x.data)) + (b @ x.data) ** 2 * np.outer(b, b)
    np.testing.assert_allclose(product(x, v).data, hessian @ v, rtol=50 * 2**-53)


def test_third_derivatives():
    f = lambda x: (x**5).sum()  # noqa: E731
    third = dt.grad(lambda x: dt.grad(lambda x: dt.grad(f)(x).sum())(x).sum())
    np.testing.assert_allclose(third(Tensor(np.array([2.0, -1]), requires_grad=True)).data, [240, 60], rtol=1e-15)


def test_derivatives_of_a_backward_pass_through_a_network():
    """The gradient penalty |df/dx|**2 in the weights, by hand for f = sum(tanh(x w))."""
    x, w = np.array([[0.3, -0.2]]), Tensor(np.array([[0.5], [1.5]]), requires_grad=True)
    inputs = Tensor(x, requires_grad=True)
    slope = dt.grad(lambda x: ops.tanh(x @ w).sum())(inputs)
    (slope * slope).sum().backward()
    # slope = s w with s = 1 - t**2; |slope|**2 = s**2 |w|**2; ds/dw = -2 t s x
    t = np.tanh(x @ w.data)
    s = 1 - t**2
    norm = (w.data**2).sum()
    expected = 2 * s * (-2 * t * s) * norm * x.T + 2 * s**2 * w.data
    np.testing.assert_allclose(w.grad, expected, rtol=1e-14)


def test_argnums_choose_and_order_the_gradients():
    f = lambda a, b, c: (a * b * c).sum()  # noqa: E731
    args = [np.array([float(n)]) for n in (2, 3, 5)]
    assert dt.grad(f, 1)(*args) == [10]
    assert dt.grad(f, (2, 0))(*args) == ([6], [15])
    assert dt.value_and_grad(f, (1,))(*args) == (30, ([10],))


def test_an_argument_that_is_not_used_has_zeros():
    f = lambda a, b: (a * a).sum()  # noqa: E731
    got = dt.grad(f, (0, 1))(np.array([3.0]), np.ones((2, 2), np.float32))
    np.testing.assert_array_equal(got[0], [6])
    np.testing.assert_array_equal(got[1], np.zeros((2, 2)))
    assert got[1].dtype == "float32"


def test_a_value_that_depends_on_no_argument_has_zeros():
    f = lambda x: Tensor(np.array(2.0))  # noqa: E731
    value, gradient = dt.value_and_grad(f)(np.ones(2))
    assert value == 2
    np.testing.assert_array_equal(gradient, [0, 0])


def test_the_identity_has_ones():
    assert dt.grad(lambda x: x)(np.array(4.0)) == 1


def test_one_tensor_given_twice_counts_as_two_arguments():
    x = Tensor(np.array([3.0]), requires_grad=True)
    a, b = dt.grad(lambda a, b: (a * a * b).sum(), (0, 1))(x, x)
    assert (a.item(), b.item()) == (18, 9)


def test_other_arguments_and_keywords_pass_through():
    f = lambda x, n, *, scale: (x * n).sum() * scale  # noqa: E731
    np.testing.assert_array_equal(dt.grad(f)(np.ones(2), 3, scale=2), [6, 6])


def test_grad_leaves_grad_and_earlier_graphs_alone():
    x = Tensor(np.array([3.0]), requires_grad=True)
    y = x * x
    dt.grad(lambda z: (z * z).sum())(y)
    assert x.grad is None
    y.sum().backward()
    np.testing.assert_array_equal(x.grad, [6])


@pytest.mark.parametrize(("f", "what"), [(lambda x: x * 2, r"shape \(2,\)"), (lambda x: 3.0, "float")])
def test_a_value_that_is_not_a_scalar_tensor_is_an_error(f, what):
    with pytest.raises(AutodiffError, match=what):
        dt.grad(f)(np.ones(2))
