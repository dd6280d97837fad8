"""Gradients that ops compute by kernels are those of the definitions in float64."""

import numpy as np
import pytest

from disttrain import Tensor, ops
from disttrain.kernels import elementwise
from tests.kernels.shapes import ONE


def slopes(arrays):
    """Return value and gradients of a small network: convolution, bias, relu, both poolings, convolution."""
    x, first, bias, second = tensors = [Tensor(a, requires_grad=True) for a in arrays]
    y = ops.relu(ops.conv2d(x, first, strides=(1, 2), padding=ONE) + bias)
    pooled = ops.max_pool2d(y, size=(2, 2), strides=(2, 2), padding=ONE)
    pooled = pooled + ops.average_pool2d(y, size=(2, 2), strides=(2, 2), padding=ONE)
    value = (ops.conv2d(pooled, second, padding=ONE) ** 2).sum()
    value.backward()
    return value.data, [t.grad for t in tensors]


@pytest.mark.parametrize("channels", [4, 17])
def test_gradients_of_a_network_are_those_of_float64(channels, instruction_set, monkeypatch):
    monkeypatch.setattr(elementwise, "_FEWEST", 0)
    generator = np.random.default_rng(channels)
    shapes = [(3, 9, 10, channels), (3, 3, channels, 18), (18,), (3, 2, 18, 5)]
    arrays = [generator.standard_normal(shape) / np.sqrt(shape[0]) for shape in shapes]
    # values that float32 holds, so that both begin with the same; without ties, near which maxima may differ
    narrow = [a.astype(np.float32) for a in arrays]
    value, grads = slopes(narrow)
    exact_value, exact_grads = slopes([a.astype(float) for a in narrow])
    assert value.dtype == np.float32
    # five sums one in the other, of fewer than 3 * 9 * 10 terms each: in the norm, errors add up as in one of them all
    bound = 5 * 270 * 2**-24
    assert abs(value - exact_value) <= bound * abs(exact_value)
    for got, exact in zip(grads, exact_grads, strict=True):
        assert got.dtype == np.float32
        assert np.linalg.norm(got - exact) <= bound * np.linalg.norm(exact)
