"""Residual blocks: values against plain NumPy, gradients in inputs and weights against finite differences."""

import math

import numpy as np
import pytest

import disttrain as dt
from disttrain import layers, ops
from disttrain.autodiff.ops.conv import same_padding
from tests.autodiff import naive
from tests.layers.blocks import BasicBlock, GPTBlock

RANDOM = np.random.default_rng(0)


class Residual(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = layers.Dense(3, "tanh", dtype=self.dtype)

    def call(self, x):
        return x + self.inner(x)


def with_random_weights(layer, x):
    """Return `layer` after a call with `x`, with weights that are not what they were made to be: no ones, no zeros."""
    layer(x)
    for weight in layer.weights:
        weight.data[...] += RANDOM.uniform(0.1, 0.4, weight.shape)
    return layer


def check_all_grads(layer, x):
    """Compare the gradients in `x` and in all trained weights with finite differences."""
    weights = layer.trainable_weights
    values = [weight.data.copy() for weight in weights]

    def function(x, *values):
        for weight, value in zip(weights, values, strict=True):
            made = ops.multiply(value, 1.0)
            weight.data, weight.call = made.data, made.call  # as if the weight were computed from the argument
        return layer(x, training=True)

    dt.check_grads(function, x, *values)


def test_a_residual_block():
    x = RANDOM.standard_normal((4, 3))
    block = with_random_weights(Residual(dtype="float64", name="block"), x)
    expected = x + np.tanh(x @ block.inner.kernel.data + block.inner.bias.data)
    np.testing.assert_allclose(block(x).data, expected, rtol=0, atol=20 * 2**-53)
    assert [w.name for w in block.weights] == ["block/inner/kernel", "block/inner/bias"]
    check_all_grads(block, x)


@pytest.mark.parametrize(("filters", "strides"), [(2, 1), (3, 2)])
def test_a_resnet_block(filters, strides):
    x = RANDOM.standard_normal((2, 5, 4, 2))
    block = with_random_weights(BasicBlock(filters, strides, dtype="float64", name="block"), x)

    def conv(x, layer):
        padding = same_padding(x.shape[1:3], layer.kernel_size, layer.strides)
        return naive.conv2d(x, layer.kernel.data, layer.strides, padding)

    def norm(x, layer):
        y = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-3)
        return y * layer.gamma.data + layer.beta.data

    y = norm(conv(np.maximum(norm(conv(x, block.conv1), block.norm1), 0), block.conv2), block.norm2)
    around = x if strides == 1 else norm(conv(x, block.shortcut[0]), block.shortcut[1])
    # sums of 27 products below 10 and of 40 values, normalized by spreads of about 1, twice
    tolerance = {"rtol": 0, "atol": 1000 * 10 * 2**-53}
    np.testing.assert_allclose(block(x, training=True).data, np.maximum(around + y, 0), **tolerance)
    names = [w.name for w in block.trainable_weights]
    assert names[:3] == ["block/conv1/kernel", "block/norm1/gamma", "block/norm1/beta"]
    assert names[-1] == ("block/shortcut_1/beta" if strides == 2 else "block/norm2/beta")
    check_all_grads(block, x)


def test_a_gpt_block():
    x = RANDOM.standard_normal((2, 3, 4))
    block = with_random_weights(GPTBlock(4, 2, dtype="float64", name="block"), x)
    w = {weight.name.removeprefix("block/"): weight.data for weight in block.weights}

    def norm(x, name):
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return y * w[f"{name}/gamma"] + w[f"{name}/beta"]

    y = norm(x, "norm1")
    q, k, v = (
        np.einsum("btd,dhk->bhtk", y, w[f"attention/{name}/kernel"]) + w[f"attention/{name}/bias"][:, None]
        for name in ("query", "key", "value")
    )
    scores = np.where(np.tri(3) == 1, np.einsum("bhik,bhjk->bhij", q, k) / math.sqrt(2), -np.inf)
    attended = np.einsum("bhij,bhjk,hkd->bid", naive.softmax(scores), v, w["attention/attention_output/kernel"])
    middle = x + attended + w["attention/attention_output/bias"]
    z = norm(middle, "norm2") @ w["wide/kernel"] + w["wide/bias"]
    gelu = z * np.vectorize(lambda value: math.erfc(-value / math.sqrt(2)) / 2)(z)
    expected = middle + gelu @ w["narrow/kernel"] + w["narrow/bias"]
    # some 100 roundings of numbers below 20, amplified by spreads of more than 0.1 in two normalizations
    np.testing.assert_allclose(block(x).data, expected, rtol=0, atol=100 * 100 * 20 * 2**-53)
    assert list(w)[:3] == ["norm1/gamma", "norm1/beta", "attention/query/kernel"]
    assert len(w) == 2 + 8 + 2 + 4
    check_all_grads(block, x)
