"""Dropout: a mask that depends on seed, path, step and place, and leaves the mean alone."""

import math

import numpy as np
import pytest

from disttrain import Tensor, backend, layers, ops
from disttrain.layers import Step, running

ONES = np.ones((8, 5, 3), np.float32)


def masked(rate=0.5, *, x=ONES, name="drop", **step):
    with running(Step(training=True, **step)):
        return layers.Dropout(rate, name=name)(x).data


def test_the_mask_depends_on_seed_path_step_and_place_only():
    once = masked(number=3, first=10)
    np.testing.assert_array_equal(masked(number=3, first=10), once)
    others = [masked(number=4, first=10), masked(number=3, first=11), masked(number=3, first=10, name="other")]
    backend.set_random_seed(7)
    others.append(masked(number=3, first=10))
    assert not any(np.array_equal(other, once) for other in others)
    assert len({other.tobytes() for other in others}) == 4


@pytest.mark.parametrize(("start", "end"), [(0, 1), (0, 3), (2, 8), (5, 5)])
def test_a_part_of_the_batch_has_its_slice_of_the_mask(start, end):
    whole = masked(number=2, first=100)
    np.testing.assert_array_equal(masked(x=ONES[start:end], number=2, first=100 + start), whole[start:end])


def test_what_is_kept_is_divided_by_its_share():
    x = np.random.default_rng(0).standard_normal((50, 40))
    with running(Step(training=True)):
        y = layers.Dropout(0.2, dtype="float64")(x).data
    kept = y != 0
    assert 0 < kept.sum() < kept.size
    np.testing.assert_allclose(y[kept], x[kept] / 0.8, rtol=2 * 2**-53)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_expectation_is_preserved(rate):
    n = 200_000
    y = masked(rate, x=np.ones((n // 100, 100)))
    # the mean of n independent numbers of variance rate / (1 - rate): six sigma, 2e-9 by chance
    assert y.mean(dtype=np.float64) == pytest.approx(1, abs=6 * math.sqrt(rate / (1 - rate) / n))


def test_neighbouring_elements_and_samples_are_independent():
    kept = masked(x=np.ones((1000, 100))) != 0
    for pairs in (kept[:, 1:] == kept[:, :-1], kept[1:] == kept[:-1]):
        # of n pairs half are equal, with a standard deviation of sqrt(n) / 2
        assert abs(pairs.sum() - pairs.size / 2) < 6 * math.sqrt(pairs.size) / 2


def test_inference_changes_nothing():
    x = Tensor(ONES)
    assert layers.Dropout(0.5)(x) is x
    assert layers.Dropout(0.5)(x, training=False) is x


def test_a_rate_of_zero_changes_nothing():
    np.testing.assert_array_equal(masked(0.0), ONES)


def test_the_gradient_passes_where_the_value_does():
    x = Tensor(ONES.copy(), requires_grad=True)
    with running(Step(training=True)):
        y = layers.Dropout(0.25)(x)
    y.sum().backward()
    np.testing.assert_array_equal(x.grad, y.data)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_mask_is_the_same_for_every_dtype(dtype):
    x = np.ones((3, 7))
    wide = ops.dropout(x, rate=0.5, key=("k",))
    got = ops.dropout(x.astype(dtype), rate=0.5, key=("k",))
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, wide)


def test_two_dropouts_of_one_model_differ():
    class Two(layers.Layer):
        def __init__(self):
            super().__init__(name="two")
            self.both = [layers.Dropout(0.5), layers.Dropout(0.5)]

        def call(self, x):
            return ops.stack([layer(x) for layer in self.both])

    with running(Step(training=True)):
        first, second = Two()(ONES).data
    assert not np.array_equal(first, second)
