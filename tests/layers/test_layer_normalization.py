"""Layer normalization against its formula."""

import numpy as np
import pytest

from disttrain import layers, ops
from disttrain.errors import ConfigError, ShapeError

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6), (2, 1, 3, 6)])
def test_each_vector_is_normalized_by_its_own_mean_and_variance(shape, center, scale):
    x = RANDOM.normal(3, 2, shape)
    layer = layers.LayerNormalization(epsilon=0.01, center=center, scale=scale, dtype="float64", name="ln")
    layer(x)
    for weight in layer.weights:
        weight.data[...] = RANDOM.uniform(0.5, 2, 6)
    gamma = layer.gamma.data if scale else 1
    beta = layer.beta.data if center else 0
    expected = np.array([(v - v.mean()) / np.sqrt(v.var() + 0.01) * gamma + beta for v in x.reshape(-1, 6)])
    # sums of 6 numbers below 10, of their squares, a root and a quotient of them
    np.testing.assert_allclose(layer(x).data, expected.reshape(shape), rtol=0, atol=200 * 2**-53)
    assert [w.name for w in layer.weights] == ["ln/gamma"] * scale + ["ln/beta"] * center
    assert all(w.shape == (6,) for w in layer.weights)


def test_it_begins_as_plain_normalization_with_keras_epsilon():
    x = RANDOM.standard_normal((5, 8)).astype("float32")
    layer = layers.LayerNormalization()
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3)
    np.testing.assert_allclose(layer(x).data, expected, rtol=0, atol=100 * 2**-24)
    assert (layer.axis, layer.epsilon) == (-1, 1e-3)


def test_a_large_mean_costs_no_digits():
    x = RANDOM.standard_normal((3, 64)) + 1e6
    one, zero = np.ones(64), np.zeros(64)
    centered = (x - 1e6) - (x - 1e6).mean(-1, keepdims=True)
    expected = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-3)
    # the mean is known to a few units in the last place of 1e6; a variance of squares would be known to 1e-4 only
    np.testing.assert_allclose(ops.layer_norm(x, one, zero, epsilon=1e-3), expected, rtol=0, atol=64 * 1e6 * 2**-53)


def test_float16_is_not_limited_by_its_squares():
    x = np.array([[-600.0, 600, -600, 600]], np.float16)  # of squares of 360,000, where float16 ends at 65,504
    y = ops.layer_norm(x, np.ones(4, np.float16), np.zeros(4, np.float16), epsilon=1e-3)
    assert y.dtype == np.float16
    np.testing.assert_array_equal(y, [[-1, 1, -1, 1]])


@pytest.mark.parametrize("axis", [0, 1, -2, (1, 2), [-1]])
def test_another_axis_is_an_error(axis):
    with pytest.raises(ConfigError, match="axis must be -1, the last, not"):
        layers.LayerNormalization(axis)


def test_another_length_is_an_error():
    layer = layers.LayerNormalization(name="ln")
    layer(np.ones((2, 3)))
    with pytest.raises(ShapeError, match=r"'ln' \(LayerNormalization\): .*\(samples, \.\.\., 3\), received \(2, 4\)"):
        layer(np.ones((2, 4)))
