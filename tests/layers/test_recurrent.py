"""LSTM and GRU: values by hand, Keras's weights, what they learn."""

import numpy as np
import pytest

import disttrain as dt
from disttrain import check_grads, layers
from disttrain.errors import ConfigError, ShapeError
from tests.autodiff.cases import recurrent as naive

RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((3, 4, 5))
BOTH = pytest.mark.parametrize("cls", [layers.LSTM, layers.GRU])


def filled(layer, x=X):
    """Return `layer`, built, with random biases too."""
    layer(x)
    for weight in layer.weights:
        weight.data[...] = RANDOM.standard_normal(weight.shape) / 2
    return layer


@BOTH
@pytest.mark.parametrize("sequences", [True, False])
@pytest.mark.parametrize("use_bias", [True, False])
def test_outputs_are_those_of_the_loop_over_units(cls, sequences, use_bias):
    layer = filled(cls(3, return_sequences=sequences, use_bias=use_bias, dtype="float64"))
    oracle = naive.lstm if cls is layers.LSTM else naive.gru
    bias = layer.bias.data if use_bias else np.zeros((12,) if cls is layers.LSTM else (2, 9))
    expected = oracle(X, layer.kernel.data, layer.recurrent_kernel.data, bias)
    y = layer(X)
    assert y.shape == ((3, 4, 3) if sequences else (3, 3))
    # 4 steps of some 30 roundings of numbers below 10
    np.testing.assert_allclose(y.data, expected if sequences else expected[:, -1], rtol=0, atol=4 * 300 * 2**-53)


def test_an_lstm_of_one_unit_by_hand():
    layer = layers.LSTM(1, dtype="float64", use_bias=False)
    x = np.array([[[1.0], [2.0]]])
    layer(x)
    layer.kernel.data[...] = [[1.0, 0.5, -1, 2]]
    layer.recurrent_kernel.data[...] = [[0.5, -0.5, 1, 0]]
    s = naive.logistic
    c = s(1) * np.tanh(-1)
    h = s(2) * np.tanh(c)
    c = s(1 - 0.5 * h) * c + s(2 + 0.5 * h) * np.tanh(-2 + h)
    np.testing.assert_allclose(layer(x).data, [[s(4) * np.tanh(c)]], rtol=1e-14)


def test_a_gru_of_one_unit_by_hand():
    layer = layers.GRU(1, dtype="float64")
    x = np.array([[[1.0], [2.0]]])
    layer(x)
    layer.kernel.data[...] = [[1.0, 0.5, -1]]
    layer.recurrent_kernel.data[...] = [[0.5, -0.5, 1]]
    layer.bias.data[...] = [[0, 0, 0.25], [0, 0, 0.75]]
    s = naive.logistic
    h = (1 - s(1)) * np.tanh(-1 + 0.25 + s(0.5) * 0.75)
    keep = s(2 + 0.5 * h)
    h = keep * h + (1 - keep) * np.tanh(-2 + 0.25 + s(1 - 0.5 * h) * (h + 0.75))
    np.testing.assert_allclose(layer(x).data, [[h]], rtol=1e-14)


def test_weights_have_keras_names_shapes_and_beginnings():
    lstm, gru = layers.LSTM(3, name="l"), layers.GRU(3, name="g")
    lstm(X), gru(X)
    assert [(w.name, w.shape) for w in lstm.weights] == [
        ("l/kernel", (5, 12)), ("l/recurrent_kernel", (3, 12)), ("l/bias", (12,)),
    ]  # fmt: skip
    assert [(w.name, w.shape) for w in gru.weights] == [
        ("g/kernel", (5, 9)), ("g/recurrent_kernel", (3, 9)), ("g/bias", (2, 9)),
    ]  # fmt: skip
    np.testing.assert_array_equal(lstm.bias.data, [0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(gru.bias.data, np.zeros((2, 9)))
    for layer in (lstm, gru):
        u = layer.recurrent_kernel.data
        np.testing.assert_allclose(u @ u.T, np.eye(3), rtol=0, atol=20 * 2**-24)  # products of rows of 12 numbers
        assert abs(layer.kernel.data).max() <= np.sqrt(6 / (5 + layer.kernel.shape[1]))
    plain = layers.LSTM(3, unit_forget_bias=False, bias_initializer="ones")
    plain(X)
    np.testing.assert_array_equal(plain.bias.data, np.ones(12))
    bare = layers.GRU(3, use_bias=False)
    bare(X)
    assert len(bare.weights) == 2


@BOTH
def test_other_activations_are_by_name_or_functions(cls):
    layer = filled(cls(2, activation="relu", recurrent_activation=lambda x: x / 4, dtype="float64"))
    oracle = naive.lstm if cls is layers.LSTM else naive.gru
    args = layer.kernel.data, layer.recurrent_kernel.data, layer.bias.data
    expected = oracle(X, *args, new=lambda v: max(v, 0), gate=lambda v: v / 4)
    np.testing.assert_allclose(layer(X).data, expected[:, -1], rtol=1e-12, atol=1e-12)


@BOTH
def test_gradients_agree_with_finite_differences(cls):
    layer = filled(cls(2, dtype="float64"), X[:2])
    check_grads(layer, X[:2])
    weights = [w.data for w in layer.weights]

    def of_weights(*values):
        layer.kernel, layer.recurrent_kernel, layer.bias = values
        return layer(X[:2])

    check_grads(of_weights, *weights)


@BOTH
@pytest.mark.parametrize("static", [True, False])
def test_it_learns_what_came_first(cls, static, tmp_path):
    """The last output must tell the sign of the first number: one step sees nothing of it."""
    generator = np.random.default_rng(3)
    x = generator.standard_normal((256, 12, 2)).astype(np.float32)
    y = (x[:, 0, 0] > 0).astype(np.int64)
    model = dt.Sequential([cls(16, return_sequences=True), cls(16), dt.layers.Dense(2)])
    loss = dt.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(dt.optimizers.Adam(0.02), loss, ["accuracy"], static=static)
    model.fit(x, y, batch_size=64, epochs=25, verbose=0)
    assert model.evaluate(x, y)[1] > 0.9  # chance gives 0.5
    model.save(tmp_path)
    np.testing.assert_array_equal(dt.load_model(tmp_path).predict(x), model.predict(x))


@BOTH
def test_what_comes_later_does_not_change_what_came_before(cls):
    layer = cls(4, return_sequences=True)
    before = layer(X).data
    changed = X.copy()
    changed[:, 2:] += 1
    after = layer(changed).data
    np.testing.assert_array_equal(after[:, :2], before[:, :2])
    assert (after[:, 2:] != before[:, 2:]).all()


@BOTH
def test_wrong_shapes_and_arguments_are_errors(cls):
    layer = cls(2, name="r")
    layer(X)
    with pytest.raises(ShapeError, match=r"'r' .*, 5\), received \(3, 4, 6\)"):
        layer(np.ones((3, 4, 6)))
    with pytest.raises(ShapeError, match=r"received \(3, 5\)"):
        layer(np.ones((3, 5)))
    with pytest.raises(ShapeError, match=r"'r' .*a step at least, received \(3, 0, 5\)"):
        layer(np.ones((3, 0, 5)))
    for units in (0, 1.5):
        with pytest.raises(ConfigError, match=f"{cls.__name__}: units must be an integer of at least 1, not {units}"):
            cls(units)
    with pytest.raises(ConfigError, match="unknown activation 'tahn'; did you mean 'tanh'"):
        cls(1, "tahn")


@BOTH
def test_a_configuration_makes_the_layer_again(cls):
    options = {"unit_forget_bias": False} if cls is layers.LSTM else {}
    layer = cls(
        2, "relu", "tanh", use_bias=False, kernel_initializer="he_normal", recurrent_initializer="zeros",
        bias_initializer="ones", return_sequences=True, return_state=True, go_backwards=True, dropout=0.1,
        recurrent_dropout=0.2, zero_output_for_mask=True, name="r", dtype="float64", trainable=False, **options,
    )  # fmt: skip
    y = layer(X)[0]
    config = layer.get_config()
    again = cls(**config)
    assert again.get_config() == config
    default = cls(1).get_config()
    assert all(config[name] != value for name, value in default.items() if name not in ("input_shape", "stateful"))
    np.testing.assert_array_equal(again(X)[0].data, y.data)
