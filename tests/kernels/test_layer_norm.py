"""Layer normalization by kernels is its definition in float64, within derived bounds."""

import numpy as np
import pytest

from disttrain import Tensor, ops
from disttrain.kernels import layer_norm
from tests.kernels.shapes import ROWS

UNIT = 2.0**-24
EPSILON = np.float32(1e-3)


class Exact:
    """Results in float64, and bounds on errors: of what is centered, of z and of the rate, each relative to that."""

    def __init__(self, x, gamma, beta, g):
        x, gamma, beta, g = (a.astype(float) for a in (x, gamma, beta, g))
        n = x.shape[-1]

        def mean(a):
            return a.mean(axis=-1, keepdims=True)

        centered = x - mean(x)
        variance = mean(centered**2) + float(EPSILON)
        rate = variance**-0.5
        z = centered * rate
        # of the mean of n numbers, then of a difference
        off = UNIT * ((n + 1) * mean(np.abs(x)) + np.abs(centered) * 2)
        off = off.max(axis=-1, keepdims=True, initial=0)
        self.rate_error = (2 * mean(np.abs(centered)) * off + off**2) / variance / 2 + UNIT * (n + 5)
        self.z_error = off * rate * (1 + self.rate_error) + np.abs(z) * (self.rate_error + UNIT)
        self.y = z * gamma + beta
        self.y_error = np.abs(gamma) * self.z_error + 2 * UNIT * (np.abs(z * gamma) + np.abs(beta))
        h = g * gamma
        slope = mean(h * z)
        self.x_gradient = rate * (h - mean(h) - z * slope)
        slope_error = UNIT * (n + 3) * mean(np.abs(h * z)) + mean(np.abs(h) * self.z_error)
        self.x_error = rate * (
            UNIT * (n + 2) * mean(np.abs(h))
            + self.z_error * (np.abs(slope) + slope_error)
            + np.abs(z) * slope_error
            + 4 * UNIT * (np.abs(h) + mean(np.abs(h)) + np.abs(z * slope))
        ) * (1 + self.rate_error) + np.abs(self.x_gradient) * (self.rate_error + UNIT)
        rows = len(x)
        self.scale_gradient = np.stack([(g * z).sum(0), g.sum(0)])
        self.scale_error = np.stack([
            (np.abs(g) * self.z_error * (1 + (rows + 1) * UNIT)).sum(0) + UNIT * (rows + 1) * np.abs(g * z).sum(0),
            UNIT * rows * np.abs(g).sum(0),
        ])  # fmt: skip


@pytest.fixture(params=[(1, 0), (3, 1e3), (1e-3, 1), (1e6, 0), (0, 7)], ids=str)
def arguments(request):
    scale, shift = request.param

    def of(shape):
        generator = np.random.default_rng(shape)
        x, g = generator.standard_normal((2, *shape), dtype=np.float32)
        gamma, beta = generator.uniform(-2, 2, (2, shape[-1])).astype(np.float32)
        return (x * np.float32(scale) + np.float32(shift)), gamma, beta, g

    return of


@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_value_and_gradients(shape, arguments, instruction_set, guarded):
    x, gamma, beta, g = arguments(shape)
    exact = Exact(x, gamma, beta, g)
    x, gamma, beta, g = map(guarded.copy, (x, gamma, beta, g))
    y = layer_norm.layer_norm(x, gamma, beta, epsilon=EPSILON).run()
    assert (np.abs(y - exact.y) <= exact.y_error).all()
    gradient = layer_norm.layer_norm_input(g, None, x, gamma, beta, epsilon=EPSILON).run()
    assert (np.abs(gradient - exact.x_gradient) <= exact.x_error).all()
    gradient = layer_norm.layer_norm_scale(g, None, x, gamma, beta, epsilon=EPSILON).run()
    assert (np.abs(gradient - exact.scale_gradient) <= exact.scale_error).all()


@pytest.mark.parametrize("shape", ROWS[2:], ids=str)
def test_the_oracle_is_the_definition(shape, arguments):
    x, gamma, beta, g = arguments(shape)
    exact = Exact(x, gamma, beta, g)
    tensors = [Tensor(a.astype(float), requires_grad=True) for a in (x, gamma, beta)]
    y = ops.layer_norm(*tensors, epsilon=float(EPSILON))
    y.backward(g.astype(float))
    # float64's rounding is 2**-29 of float32's
    assert (np.abs(y.data - exact.y) <= exact.y_error * 2**-25).all()
    assert (np.abs(tensors[0].grad - exact.x_gradient) <= exact.x_error * 2**-25).all()
    made = np.stack([tensors[1].grad, tensors[2].grad])
    assert (np.abs(made - exact.scale_gradient) <= exact.scale_error * 2**-25).all()


@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_a_row_has_the_same_bits_in_any_batch(shape, instruction_set, guarded):
    generator = np.random.default_rng(0)
    x, g = generator.standard_normal((2, *shape), dtype=np.float32)
    gamma, beta = generator.standard_normal((2, shape[-1]), dtype=np.float32)
    y = layer_norm.layer_norm(x, gamma, beta, epsilon=EPSILON).run()
    gradient = layer_norm.layer_norm_input(g, None, x, gamma, beta, epsilon=EPSILON).run()
    for n in range(shape[0]):
        alone = layer_norm.layer_norm(guarded.copy(x[n], 20), gamma, beta, epsilon=EPSILON).run()
        assert alone.tobytes() == y[n].tobytes()
        alone = layer_norm.layer_norm_input(g[n], None, guarded.copy(x[n], 12), gamma, beta, epsilon=EPSILON).run()
        assert alone.tobytes() == gradient[n].tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("length", [3, 40])
def test_nan_and_infinity_make_their_row_nan(value, length, instruction_set):
    x = np.linspace(0, 1, 2 * length, dtype=np.float32).reshape(2, length)
    x[0, length - 1] = value
    gamma = beta = np.ones(length, np.float32)
    with np.errstate(invalid="ignore"):
        expected = ops.layer_norm.definition(x, gamma, beta, epsilon=1e-3)
    got = layer_norm.layer_norm(x, gamma, beta, epsilon=1e-3).run()
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    got = layer_norm.layer_norm_input(np.ones_like(x), None, x, gamma, beta, epsilon=1e-3).run()
    np.testing.assert_array_equal(np.isnan(got).all(axis=1), [True, False])


def test_the_op_computes_by_the_kernel_and_elsewhere_by_its_definition(instruction_set):
    x = Tensor(np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4), requires_grad=True)
    gamma = np.ones(4, np.float32)
    assert ops.layer_norm(x, gamma, gamma, epsilon=1e-3).call.op is ops.layer_norm
    assert ops.layer_norm(x, 1.0, 0.0, epsilon=1e-3).call.op is not ops.layer_norm
    assert layer_norm.layer_norm(x.data, gamma[:1], gamma, epsilon=1e-3) is None
    assert layer_norm.layer_norm(x.data.T, gamma[:3], gamma[:3], epsilon=1e-3) is None
    assert layer_norm.layer_norm(np.zeros((2, 0), np.float32), gamma[:0], gamma[:0], epsilon=1e-3) is None
