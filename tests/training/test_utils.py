"""`dt.utils`: labels as vectors, the seed, and the digest that tells two models apart."""

import numpy as np
import pytest

import disttrain as dt
from disttrain import backend
from disttrain.errors import ConfigError, DataError
from tests.training import worlds


@pytest.mark.parametrize("labels", [[0, 2, 1], np.array([0, 2, 1], np.uint8), np.array([[0], [2]]), np.int64(1), []])
def test_labels_become_one_hot_vectors(labels):
    vectors = dt.utils.to_categorical(labels, 3)
    np.testing.assert_array_equal(vectors, np.eye(3, dtype="float32")[np.asarray(labels, int)], strict=True)


def test_the_number_of_classes_is_one_more_than_the_largest_label():
    assert dt.utils.to_categorical([1, 4]).shape == (2, 5)


@pytest.mark.parametrize(("label", "classes"), [(3, 3), (-1, 3), (-1, None)])
def test_a_label_outside_the_classes_is_named(label, classes):
    with pytest.raises(DataError, match=f"label {label} is outside the classes 0 to"):
        dt.utils.to_categorical([0, 1, label], classes)


def test_the_seed_decides_on_initial_weights():
    def digest(seed):
        dt.utils.set_random_seed(seed)
        return dt.state_digest(worlds.dense_net())

    assert digest(1) == digest(1) != digest(2)
    assert backend.seed() == 2
    with pytest.raises(ConfigError, match="seed must be"):
        dt.utils.set_random_seed(-1)


def test_the_digest_tells_models_apart():
    model = worlds.conv_net()
    digest = dt.state_digest(model)
    assert digest == dt.state_digest(worlds.conv_net())
    assert len(digest) == 64
    for weight in model.weights:  # moving averages too, and the last bit of each
        flat = weight.data.reshape(-1)
        before = flat[-1]
        flat[-1] = np.nextafter(before, np.float32(9))
        assert dt.state_digest(model) != digest, weight.name
        flat[-1] = before
    assert dt.state_digest(model) == digest
    renamed = dt.Sequential([dt.layers.Dense(2, name="a", input_shape=(2,))])
    assert dt.state_digest(renamed) != dt.state_digest(dt.Sequential([dt.layers.Dense(2, name="b", input_shape=(2,))]))
