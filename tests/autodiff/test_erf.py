"""The error function against Python's, over all of its range; activations where their formulas could overflow."""

import math

import numpy as np
import pytest

from disttrain import Tensor, ops

# All along the range, tiny numbers, and both sides of each place where the formula changes.
GRID = np.concatenate(
    [
        np.linspace(-7, 7, 280_001),
        np.geomspace(1e-300, 1, 20_001),
        *[at + np.linspace(-1e-9, 1e-9, 1001) for at in (0.46875, 4, 4.2, 6)],
    ]
)
EXACT = np.array([math.erf(x) for x in GRID])


def test_float64_has_the_rounding_of_its_formula():
    error = np.abs(ops.erf(GRID) - EXACT)
    # All coefficients are positive, so Horner's scheme of degree n errs by at most 2n roundings, relatively. Degree 4
    # over degree 4, a quotient, a square, a product: 20 of erf. Degree 8 over degree 8, a quotient, exp of a rounded
    # square, a product: 37 of at most erfc(0.46875) = 0.51, and the difference: 20 of 1. 2 of 1 is what it comes to.
    inner = np.abs(GRID) <= 0.46875
    assert (error[inner] <= 20 * 2**-53 * np.abs(EXACT[inner])).all()
    assert error[~inner].max() <= 20 * 2**-53


def test_float32_has_the_error_of_its_formula():
    x = GRID.astype(np.float32)
    x = x[np.abs(x) > 1e-30]  # whose erf is a normal number
    exact = np.array([math.erf(v) for v in x])
    # the formula's 9.5e-8, 4 roundings of the polynomial and its product, and NumPy's tanh: 4 units in the last place
    bound = 9.5e-8 + 4 * 2**-24 + 4 * 2**-23
    y = ops.erf(x)
    assert y.dtype == np.float32
    assert (np.abs(y - exact) <= bound * np.abs(exact)).all()
    assert np.abs(y).max() == 1


def test_float16_is_rounded_once():
    x = np.linspace(-4, 4, 2001).astype(np.float16)
    exact = np.array([math.erf(v) for v in x])
    y = ops.erf(x)
    assert y.dtype == np.float16
    # half a unit in the last place, and a thousandth of it for float32's own error
    assert (np.abs(y - exact) <= 0.501 * np.spacing(np.abs(exact).astype(np.float16))).all()


# float64: Cody's formula errs by less than 1e-18. Of both the coefficients that matter are rounded once each.
@pytest.mark.parametrize(("dtype", "formula", "rounding"), [("float32", 9.5e-8, 2**-24), ("float64", 0, 2**-53)])
def test_roundings_cancel_and_leave_the_error_of_the_formula(dtype, formula, rounding):
    """A wrong digit in a coefficient would show here: it errs to one side over a long way."""
    x = np.linspace(0.01, 7, 200_000).astype(dtype)
    exact = np.array([math.erf(v) for v in x])
    error = (ops.erf(x) / exact - 1).reshape(200, 1000).mean(axis=1)  # over ways of 0.035
    assert np.abs(error).max() <= formula + 2 * rounding


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_limits(dtype):
    x = np.array([-np.inf, -60000, -0.0, 0, 60000, np.inf, np.nan], dtype)
    np.testing.assert_array_equal(ops.erf(x), np.array([-1, -1, 0, 0, 1, 1, np.nan], dtype))
    far = Tensor(x[[1, 4]], requires_grad=True)
    ops.erf(far).sum().backward()
    np.testing.assert_array_equal(far.grad, [0, 0])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_arrays_larger_than_a_block_and_not_contiguous(dtype):
    x = np.random.default_rng(0).standard_normal((300, 500)).astype(dtype)
    expected = np.array([[ops.erf(x[i, j : j + 1])[0] for j in range(0, 500, 99)] for i in range(300)])
    np.testing.assert_array_equal(ops.erf(x.T)[::99].T, expected)
    np.testing.assert_array_equal(ops.erf(x)[:, ::99], expected)


def test_whole_numbers_become_floats():
    assert ops.erf(np.array([1, 2])).tolist() == pytest.approx([math.erf(1), math.erf(2)], abs=1e-15)
    assert float(ops.erf(0.5)) == pytest.approx(math.erf(0.5), abs=1e-15)


FAR = {
    "elu": (-1, 1), "gelu": (0, 1), "leaky_relu": (-0.2, 1), "silu": (0, 1), "softplus": (0, 1),
    "selu": (-1.0507009873554805 * 1.6732632423543772, 1.0507009873554805),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("name", FAR)
def test_activations_far_out_reach_their_limits(name, dtype):
    # 2**15 is near the largest number of float16: a square of it, or an exp, overflows there
    size = 2.0**15 if name in ("gelu", "silu", "softplus") else 2.0**14
    left, slope = FAR[name]
    x = Tensor(np.array([-size, size], dtype), requires_grad=True)
    y = getattr(ops, name)(x)
    y.sum().backward()
    left_slope, left = (0.2, left * size) if name == "leaky_relu" else (0, left)
    rounding = 4 * np.finfo(dtype).eps
    np.testing.assert_allclose(y.data, [left, slope * size], rtol=rounding)
    np.testing.assert_allclose(x.grad, [left_slope, slope], rtol=rounding)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_approximate_gelu_far_out_reaches_its_limits(dtype):
    x = Tensor(np.array([-(2.0**15), 2.0**15], dtype), requires_grad=True)
    y = ops.gelu(x, approximate=True)
    y.sum().backward()
    np.testing.assert_array_equal(y.data, [0, 2**15])
    np.testing.assert_array_equal(x.grad, [0, 1])


def test_approximate_gelu_is_near_gelu():
    x = np.linspace(-8, 8, 10_001)
    difference = np.abs(ops.gelu(x, approximate=True) - ops.gelu(x)).max()
    assert 1e-4 < difference < 5e-4
