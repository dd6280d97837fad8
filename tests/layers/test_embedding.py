"""Embedding: rows of a table, gradients added up by row, and indices that have no row."""

import numpy as np
import pytest

import disttrain as dt
from disttrain import Tensor, layers, ops
from disttrain.errors import ConfigError, DataError

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(5,), (4, 3), (2, 3, 2), (0, 3)])
@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64", "float32"])
def test_the_output_is_the_row_of_each_index(shape, dtype):
    layer = layers.Embedding(7, 4, name="e")
    indices = RANDOM.integers(0, 7, shape)
    y = layer(indices.astype(dtype))
    assert y.shape == (*shape, 4)
    assert y.dtype == "float32"
    for at in np.ndindex(shape):
        np.testing.assert_array_equal(y.data[at], layer.embeddings.data[indices[at]])
    assert [(w.name, w.shape) for w in layer.trainable_weights] == [("e/embeddings", (7, 4))]


def test_the_vectors_begin_uniformly_as_in_keras():
    layer = layers.Embedding(200, 50)
    layer(np.array([0]))
    values = layer.embeddings.data
    assert values.min() >= np.float32(-0.05)
    assert values.max() < 0.05
    assert np.ptp(values) > 0.0999  # of 10,000 numbers: missing a thousandth at an end has a chance of 2 * exp(-5)
    other = layers.Embedding(200, 50, "ones")
    other(np.array([0]))
    assert (other.embeddings.data == 1).all()


@pytest.mark.parametrize(("rows", "shape", "width"), [(3, (40,), 5), (1000, (8, 16), 3), (1, (4, 4), 1), (6, (0,), 2)])
def test_gradients_of_repeated_indices_add_up(rows, shape, width):
    layer = layers.Embedding(rows, width, dtype="float64")
    indices, g = RANDOM.integers(0, rows, shape), RANDOM.standard_normal((*shape, width))
    layer(indices).backward(g)
    expected = np.zeros((rows, width))
    for at in np.ndindex(shape):
        expected[indices[at]] += g[at]
    # the same sums of fewer than 40 numbers below 5
    np.testing.assert_allclose(layer.embeddings.grad, expected, rtol=0, atol=40 * 40 * 5 * 2**-53)


def test_indices_are_an_array_argument_of_the_op():
    table = Tensor(RANDOM.standard_normal((4, 2)), requires_grad=True)
    indices = np.array([1, 3])
    call = ops.embedding(indices, table).call
    assert call.argument(0) is indices
    assert not any(isinstance(value, np.ndarray) for value in call.attributes.values())


def test_a_large_index_is_not_rounded():
    # float32 has no 2**24 + 1: cast to it, the index would be another
    table = np.zeros((2**24 + 2, 1), np.float32)
    table[2**24 + 1] = 5
    layer = layers.Embedding(2**24 + 2, 1, embeddings_initializer=lambda generator, shape: table)
    assert layer(np.array([2**24 + 1])).data[0, 0] == 5


@pytest.mark.parametrize(
    ("indices", "expected"),
    [
        ([[0, 1], [2, 7]], r"index 7 of sample 1 is none of the rows 0 to 6 \(1 of 4 indices are none\)"),
        ([[0, 1], [2, 3], [4, -1]], r"index -1 of sample 2 is none .*\(1 of 6"),
        ([9, 8, 1], r"index 9 of sample 0 .*\(2 of 3"),
        ([[0.0, 1.0], [0.5, 1.0]], r"index 0\.5 of sample 1 .*whole numbers"),
        ([float("nan")], "index nan of sample 0"),
        ([1.0, -1.0], r"index -1\.0 of sample 1"),
    ],
)
def test_an_index_without_a_row_is_an_error_with_its_sample(indices, expected):
    layer = layers.Embedding(7, 2, name="words")
    with pytest.raises(DataError, match=r"layer 'words' \(Embedding\): " + expected):
        layer(np.array(indices))
    with pytest.raises(DataError, match="embedding: " + expected):
        ops.embedding(np.array(indices), np.zeros((7, 2)))


def test_sizes_below_one_are_errors():
    with pytest.raises(ConfigError, match="input_dim must be at least 1, not 0"):
        layers.Embedding(0, 1)
    with pytest.raises(ConfigError, match="output_dim must be at least 1, not -2"):
        layers.Embedding(1, -2)


def test_a_configuration_makes_the_layer_again():
    layer = layers.Embedding(7, 3, "he_normal", name="n", dtype="float64", trainable=False, input_shape=(4,))
    config = layer.get_config()
    again = layers.Embedding(**config)
    assert again.get_config() == config
    assert (config["input_dim"], config["output_dim"], config["embeddings_initializer"]) == (7, 3, "he_normal")
    np.testing.assert_array_equal(again([[0, 6]]).data, layer([[0, 6]]).data)


def test_a_sequential_of_it_is_saved_and_made_again(tmp_path):
    model = dt.Sequential(
        [
            layers.Embedding(9, 4, input_shape=(5,)),
            layers.LayerNormalization(epsilon=0.01),
            layers.Flatten(),
            layers.Dense(3, activation="softmax"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy", ["accuracy"])
    x, y = RANDOM.integers(0, 9, (20, 5)), RANDOM.integers(0, 3, 20)
    before = dt.state_digest(model)
    model.fit(x, y, batch_size=8, epochs=2, verbose=0)
    assert dt.state_digest(model) != before
    model.save(tmp_path)
    loaded = dt.load_model(tmp_path)
    assert [layer.get_config() for layer in loaded.layers] == [layer.get_config() for layer in model.layers]
    assert [w.name for w in loaded.weights][:3] == [
        "embedding/embeddings", "layer_normalization/gamma", "layer_normalization/beta",
    ]  # fmt: skip
    np.testing.assert_array_equal(loaded.predict(x), model.predict(x))
    for each in (model, loaded):
        each.fit(x, y, batch_size=8, epochs=3, initial_epoch=2, verbose=0)
    assert dt.state_digest(loaded) == dt.state_digest(model)
