"""Ops where finite differences cannot look: kinks, ties, zeros, numbers that nearly overflow."""

import numpy as np
import pytest

import disttrain as dt
from disttrain import Tensor, ops


def gradient(function, *args):
    tensors = [Tensor(np.asarray(a), requires_grad=True) for a in args]
    y = function(*tensors)
    y.backward(np.ones(y.shape))
    return [t.grad for t in tensors]


@pytest.mark.parametrize(("op", "expected"), [(ops.abs, [-1, 0, 1]), (ops.relu, [0, 0, 1])])
def test_the_gradient_at_the_kink_is_zero(op, expected):
    np.testing.assert_array_equal(gradient(op, [-2.0, 0.0, 2.0])[0], expected)


@pytest.mark.parametrize("op", [ops.maximum, ops.minimum])
def test_equal_arguments_share_the_gradient(op):
    np.testing.assert_array_equal(gradient(op, [1.0, 2.0], [1.0, 2.0]), [[0.5, 0.5], [0.5, 0.5]])


@pytest.mark.parametrize("op", [ops.maximum, ops.minimum])
def test_the_largest_numbers_are_compared_without_their_difference(op):
    """Which would overflow, a warning and so an error here, or be no number."""
    large = np.array([6e4, np.inf, -np.inf, -6e4], np.float16)
    chosen = [True, True, False, False] if op is ops.maximum else [False, False, True, True]
    np.testing.assert_array_equal(gradient(op, large, -large), [chosen, np.logical_not(chosen)])
    np.testing.assert_array_equal(gradient(op, large, large), np.full((2, 4), 0.5))


def test_equal_maxima_of_an_axis_share_the_gradient():
    np.testing.assert_array_equal(gradient(lambda x: ops.max(x, axis=0), [[3.0, 1], [3, 2], [0, 2]])[0],
                                  [[0.5, 0], [0.5, 0.5], [0, 0.5]])  # fmt: skip


def test_clip_passes_the_gradient_on_its_bounds_and_not_beyond():
    x = [-1.5, -1.0, 0.0, 1.0, 1.5]
    np.testing.assert_array_equal(gradient(lambda t: ops.clip(t, low=-1, high=1), x)[0], [0, 1, 1, 1, 0])


def test_where_hides_what_it_does_not_choose():
    x = Tensor(np.array([1.0, -1.0]), requires_grad=True)
    y = ops.where(x > 0, x * 2, np.array([np.nan, 5.0]))
    np.testing.assert_array_equal(y.data, [2, 5])
    y.sum().backward()
    np.testing.assert_array_equal(x.grad, [2, 0])


@pytest.mark.parametrize("exponent", [0, 1, 2, 3])
def test_all_derivatives_of_a_power_are_finite_at_zero(exponent):
    """d^k x^n = n (n-1) ... (n-k+1) x^(n-k); at 0 that is n! for k = n and 0 for any other k > 0."""
    f = lambda x: (x**exponent).sum()  # noqa: E731
    for order in range(1, 5):
        f = dt.grad(f)
        expected = np.prod(range(1, exponent + 1)) if order == exponent else 0
        point = Tensor(np.zeros(1), requires_grad=True)
        np.testing.assert_array_equal(f(point).data, [expected])
        f = lambda x, f=f: f(x).sum()  # noqa: E731


def test_a_power_gives_no_gradient_to_an_exponent_that_is_a_number():
    # the logarithm of a negative number would be a warning, which is an error here
    np.testing.assert_array_equal(gradient(lambda x: x**2, [-3.0])[0], [-6])


@pytest.mark.parametrize(("dtype", "large"), [("float16", 6e4), ("float32", 3e38), ("float64", 1e308)])
def test_bounded_functions_take_the_largest_numbers(dtype, large):
    x = np.array([-large, 0, large], dtype)
    np.testing.assert_array_equal(ops.sigmoid(x), np.array([0, 0.5, 1], dtype))
    np.testing.assert_array_equal(ops.tanh(x), np.array([-1, 0, 1], dtype))
    np.testing.assert_array_equal(ops.softmax(x / 2), np.array([0, 0, 1], dtype))
    np.testing.assert_array_equal(ops.log_softmax(x / 2), np.array([-large, -large / 2, 0]).astype(dtype))


def test_cross_entropies_are_exact_where_the_probability_underflows():
    z = np.array([[1000.0, 0.0, -1000.0]])
    np.testing.assert_array_equal(ops.sparse_softmax_cross_entropy(z, np.array([2])), [2000])
    np.testing.assert_array_equal(ops.softmax_cross_entropy(z, np.array([[0.0, 1, 0]])), [1000])
    np.testing.assert_array_equal(ops.sigmoid_cross_entropy(z, np.array([[0.0, 0, 1]])), [[1000, np.log(2), 1000]])


def test_small_terms_of_log1p_and_sigmoid_cross_entropy_survive():
    assert ops.log1p(np.array(1e-20)) == 1e-20
    np.testing.assert_allclose(ops.sigmoid_cross_entropy(np.array([-40.0]), 0.0), np.exp(-40.0), rtol=1e-15)


def test_rounding_to_integers_has_no_gradient():
    x = Tensor(np.array([0.25, 1.5]), requires_grad=True)
    y = ops.cast(ops.cast(x, dtype="int64"), dtype="float64") * 10 + x
    np.testing.assert_array_equal(y.data, [0.25, 11.5])
    y.sum().backward()
    np.testing.assert_array_equal(x.grad, [1, 1])


def test_a_place_named_twice_gets_both_gradients():
    np.testing.assert_array_equal(gradient(lambda x: x[[0, 0, 2]] * np.array([1.0, 10, 100]), [0.0, 0, 0])[0],
                                  [11, 0, 100])  # fmt: skip


def test_moments_in_float16_neither_overflow_nor_stop_counting():
    x = np.full((5000, 2), (10, 200), np.float16)  # sums of 50,000 and 1,000,000; float16 ends at 65,504
    x[::2] += np.array((2, 100), np.float16)
    mean, variance = ops.moments(x)
    assert mean.dtype == variance.dtype == "float16"
    np.testing.assert_array_equal(mean, [11, 250])
    np.testing.assert_array_equal(variance, [1, 2500])


def test_moments_keep_their_digits_beside_a_large_mean():
    spread = np.random.default_rng(0).integers(-8, 8, (64, 1))
    mean, variance = ops.moments((spread + 4096).astype("float32"))
    # sum, mean and deviations are fractions of 64 with at most 19 bits: exact; squares are 2**24 and would not be
    assert mean[0] == spread.mean() + 4096
    assert variance[0] == pytest.approx(spread.var(), rel=64 * 2**-24)  # a sum of 64


def test_moments_sum_over_others_in_float64():
    seen = []

    def total(part):
        seen.append(part)
        return part

    ops.moments(np.ones((3, 2), np.float32), total=total)
    assert [(p.dtype, p.shape, p[-1]) for p in seen] == [("float64", (3,), 3)] * 2


def test_dropout_of_almost_everything_and_of_nothing():
    x = np.ones((4, 1000), np.float32)
    np.testing.assert_array_equal(ops.dropout(x, rate=0.0, key=("k",)), x)
    kept = ops.dropout(x, rate=1 - 2**-10, key=("k",))
    assert set(np.unique(kept)) <= {0, 2**10}
