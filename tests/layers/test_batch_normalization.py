"""Batch normalization against its formula, in parts and whole."""

import numpy as np
import pytest

import disttrain as dt
from disttrain import Tensor, layers, ops
from disttrain.layers import BatchNormalization, Layer, Step, running

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(3, 2, (6, 4, 2))
# means and variances of 24 numbers below 10: each of about 30 roundings, and roots and quotients of them
TOLERANCE = {"rtol": 0, "atol": 200 * 2**-53}


def random(generator, shape):
    return generator.uniform(0.5, 2, shape)


def make(**options):
    layer = BatchNormalization(dtype="float64", name="bn", **options)
    layer(np.zeros((0, 4, 2)))
    for weight in (layer.gamma, layer.beta):
        if weight is not None:
            weight.data[...] = RANDOM.uniform(0.5, 2, 2)
    return layer


def formula(x, mean, variance, layer, epsilon):
    gamma = 1 if layer.gamma is None else layer.gamma.data
    beta = 0 if layer.beta is None else layer.beta.data
    return gamma * (x - mean) / np.sqrt(variance + epsilon) + beta


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("center", [True, False])
def test_training_normalizes_by_the_batch(center, scale):
    layer = make(center=center, scale=scale, epsilon=0.01)
    expected = formula(X, X.mean((0, 1)), X.var((0, 1)), layer, 0.01)
    np.testing.assert_allclose(layer(X, training=True).data, expected, **TOLERANCE)
    assert len(layer.trainable_weights) == center + scale


def test_inference_normalizes_by_the_moving_averages():
    layer = make()
    layer.moving_mean.data[:], layer.moving_variance.data[:] = [1, 2], [4, 9]
    expected = formula(X, np.array([1, 2]), np.array([4, 9]), layer, 1e-3)
    np.testing.assert_allclose(layer(X).data, expected, **TOLERANCE)
    np.testing.assert_array_equal(layer.moving_mean.data, [1, 2])


@pytest.mark.parametrize("momentum", [None, 0.5])
def test_moving_averages_are_keras(momentum):
    """Keras 3: ``moving = moving * momentum + batch * (1 - momentum)``, from 0 and 1, of the biased variance."""
    layer = make() if momentum is None else make(momentum=momentum)
    momentum = momentum or 0.99
    mean, variance = np.zeros(2), np.ones(2)
    for step in range(3):
        x = X * (step + 1)
        layer(x, training=True)
        mean = mean * momentum + x.mean((0, 1)) * (1 - momentum)
        variance = variance * momentum + ((x - x.mean((0, 1))) ** 2).sum((0, 1)) / 24 * (1 - momentum)
    np.testing.assert_allclose(layer.moving_mean.data, mean, **TOLERANCE)
    np.testing.assert_allclose(layer.moving_variance.data, variance, rtol=200 * 2**-53)


def test_gradients_flow_through_the_statistics():
    def f(x, gamma, beta):
        return ops.batch_norm(x, *ops.moments(x), gamma, beta, epsilon=1e-3)

    dt.check_grads(f, X[:3, 0], np.array([1.5, -2]), np.array([0.5, 1]), order=2)


def test_a_frozen_layer_behaves_as_in_inference():
    layer = make()
    layer.trainable = False
    np.testing.assert_array_equal(layer(X, training=True).data, layer(X).data)
    np.testing.assert_array_equal(layer.moving_mean.data, [0, 0])


class Block(Layer):
    def __init__(self, **options):
        super().__init__(**options)
        self.inner = [BatchNormalization()]

    def call(self, x):
        return self.inner[0](x)


class Outer(Layer):
    def __init__(self, **options):
        super().__init__(**options)
        self.block = Block()
        self.drop = layers.Dropout(0.5)

    def call(self, x):
        return self.drop(self.block(x))


def test_a_layer_within_a_frozen_one_behaves_as_in_inference():
    block = Block(trainable=False)
    np.testing.assert_array_equal(block(X, training=True).data, block(X).data)
    np.testing.assert_array_equal(block.inner[0].moving_mean.data, [0, 0])
    outer = Outer(trainable=False)
    with running(Step(training=True)):
        y = outer(X)
    np.testing.assert_array_equal(outer.block.inner[0].moving_mean.data, [0, 0])
    assert (y.data == 0).any()  # dropout drops all the same, as in Keras


def test_freezing_one_layer_leaves_the_next_alone():
    Block(trainable=False)(X, training=True)
    layer = make()
    layer(X, training=True)
    assert layer.moving_mean.data.all()


class Halves:
    """Stands for the ranks: gives each the sum of what it and another have handed in, in turn."""

    def __init__(self, x, parts):
        self.parts = [x[part] for part in parts]

    def run(self, layer, x):
        """Return `layer`'s output for `x`, where the statistics are those of all parts."""
        sums = self._sums_of_the_first_pass()
        mean = sums[:-1] / sums[-1:]

        def total(part):
            total.calls += 1
            others = sums if total.calls == 1 else self._sums_of_the_second_pass(mean)
            own = np.array(part.data)
            np.testing.assert_array_equal(own[-1], len(x) * 4)
            return part + (others - own)

        total.calls = 0
        with running(Step(training=True, total=total)):
            return layer(x)

    def _sums_of_the_first_pass(self):
        whole = np.concatenate(self.parts).reshape(-1, 2)
        return np.array([*whole.sum(0), len(whole)])

    def _sums_of_the_second_pass(self, mean):
        whole = np.concatenate(self.parts).reshape(-1, 2)
        return np.array([*((whole - mean) ** 2).sum(0), len(whole)])


@pytest.mark.parametrize("cut", [3, 1, 6])
def test_two_parts_combined_equal_the_whole(cut):
    """With a cut at 6 the second part is empty: a rank without samples of the last, short batch."""
    expected = make()
    whole = expected(X, training=True).data
    for part in (slice(cut), slice(cut, None)):
        layer = make()
        layer.gamma.data[...], layer.beta.data[...] = expected.gamma.data, expected.beta.data
        y = Halves(X, [slice(cut), slice(cut, None)]).run(layer, X[part])
        np.testing.assert_allclose(y.data, whole[part], **TOLERANCE)
        np.testing.assert_allclose(layer.moving_mean.data, expected.moving_mean.data, **TOLERANCE)
        np.testing.assert_allclose(layer.moving_variance.data, expected.moving_variance.data, **TOLERANCE)


def test_unsynchronized_layers_look_at_their_own_samples_only():
    def total(part):
        raise AssertionError("asked others")

    layer, alone = make(synchronized=False), make()
    layer.gamma.data[...], layer.beta.data[...] = alone.gamma.data, alone.beta.data
    with running(Step(training=True, total=total)):
        y = layer(X)
    np.testing.assert_array_equal(y.data, alone(X, training=True).data)


def test_unsynchronized_layers_without_samples_keep_their_averages():
    layer = make(synchronized=False)
    layer(X[:0], training=True)
    np.testing.assert_array_equal(layer.moving_mean.data, [0, 0])
    np.testing.assert_array_equal(layer.moving_variance.data, [1, 1])


def test_moving_averages_are_not_recorded():
    x = Tensor(X, requires_grad=True)
    layer = make()
    layer(x, training=True)
    assert not layer.moving_mean.requires_grad
    assert layer.moving_mean.call is None
