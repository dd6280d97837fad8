"""Recurrent layers that begin with a state, return it, go backwards, leave steps out or drop elements."""

import gc
import itertools

import numpy as np
import pytest

import disttrain as dt
from disttrain import Tensor, check_grads, layers
from disttrain.comm import threads
from disttrain.errors import ConfigError, ShapeError
from disttrain.kernels.library import native
from disttrain.layers import Step, mask, running
from tests.autodiff.cases import recurrent as naive
from tests.training import worlds

RANDOM = np.random.default_rng(0)
SAMPLES, STEPS, LENGTH, UNITS = 3, 5, 4, 2
X = RANDOM.standard_normal((SAMPLES, STEPS, LENGTH))
MASK = np.array([[1, 1, 1, 0, 0], [0, 1, 0, 0, 1], [1, 1, 1, 1, 1]], bool)
KINDS = {layers.LSTM: (naive.lstm_step, 2), layers.GRU: (naive.gru_step, 1), layers.SimpleRNN: (naive.rnn_step, 1)}
ALL = pytest.mark.parametrize("cls", KINDS)


def filled(layer, x=X):
    """Return `layer`, built, with random biases too."""
    layer(x)
    generator = np.random.default_rng(1)
    for weight in layer.weights:
        weight.data[...] = generator.standard_normal(weight.shape) / 2
    return layer


def begin_of(cls):
    generator = np.random.default_rng(2)
    return [generator.standard_normal((SAMPLES, UNITS)) for _ in range(KINDS[cls][1])]


def expected(layer, x, begin=None, mask=None, **how):
    """Return outputs at all steps, and states, number by number."""
    step, states = KINDS[type(layer)]
    weights = layer.kernel.data, layer.recurrent_kernel.data, layer.bias.data
    begin = begin or [np.zeros((len(x), layer.units))] * states
    if layer.go_backwards:
        x, mask = x[:, ::-1], None if mask is None else mask[:, ::-1]
    return naive.through(step(*weights), x, begin, mask=mask, zeros=layer.zero_output_for_mask, **how)


def assert_close(ours, theirs):
    # STEPS steps of some 30 roundings of numbers below 10
    np.testing.assert_allclose(ours.data, theirs, rtol=0, atol=STEPS * 300 * 2**-53)


@ALL
@pytest.mark.parametrize(
    ("begins", "masked", "zeros", "backwards"), [*itertools.product([False, True], repeat=4)]
)  # fmt: skip
def test_outputs_and_states_are_those_of_the_definition(cls, begins, masked, zeros, backwards):
    options = {"zero_output_for_mask": zeros, "go_backwards": backwards, "dtype": "float64"}
    given = {"initial_state": begin_of(cls) if begins else None, "mask": MASK if masked else None}
    both = filled(cls(UNITS, return_sequences=True, return_state=True, **options))
    y, *states = both(X, **given)
    theirs = expected(both, X, given["initial_state"], given["mask"])
    assert len(states) == KINDS[cls][1]
    for each, its in zip((y, *states), theirs, strict=True):
        assert_close(each, its)
    last = filled(cls(UNITS, **options))
    assert_close(last(X, **given), theirs[0][:, -1])
    with_state = filled(cls(UNITS, return_state=True, **options))(X, **given)
    for each, its in zip(with_state, (theirs[0][:, -1], *theirs[1:]), strict=True):
        assert_close(each, its)


@ALL
def test_gradients_agree_with_finite_differences(cls):
    layer = filled(
        cls(UNITS, return_sequences=True, return_state=True, go_backwards=True, dropout=0.3, recurrent_dropout=0.3,
            dtype="float64", name="r")
    )  # fmt: skip
    names = ["kernel", "recurrent_kernel", "bias"]
    weights = [getattr(layer, name).data for name in names]

    def everything(x, *values):
        for name, value in zip(names, values[:3], strict=True):
            setattr(layer, name, value)
        with running(Step(training=True, number=3)):
            y, *states = layer(x, initial_state=list(values[3:]), mask=MASK)
        return dt.ops.concatenate([y, *[state.reshape(SAMPLES, 1, UNITS) for state in states]], axis=1)

    check_grads(everything, X, *weights, *begin_of(cls))


@ALL
def test_a_state_that_is_returned_and_given_makes_one_sequence_of_two(cls):
    layer = filled(cls(UNITS, return_sequences=True, return_state=True))
    x = X.astype(np.float32)
    whole, *ends = layer(x)
    first, *states = layer(x[:, :2])
    second, *its_ends = layer(x[:, 2:], initial_state=states)
    # float32: STEPS steps of some 30 roundings of numbers below 10, by a kernel and by a loop
    tolerance = STEPS * 300 * 2**-24
    np.testing.assert_allclose(np.hstack([first.data, second.data]), whole.data, rtol=0, atol=tolerance)
    for one, other in zip(ends, its_ends, strict=True):
        np.testing.assert_allclose(one.data, other.data, rtol=0, atol=tolerance)


@ALL
@pytest.mark.parametrize("given", [lambda m: m, lambda m: m.astype(np.int64), lambda m: m.tolist(), Tensor])
def test_a_mask_may_be_of_integers_a_list_or_a_tensor(cls, given):
    layer = filled(cls(UNITS, dtype="float64"))
    assert_close(layer(X, mask=given(MASK)), expected(layer, X, mask=MASK)[0][:, -1])


@ALL
def test_a_mask_of_all_steps_changes_nothing(cls):
    layer = filled(cls(UNITS, return_sequences=True, dtype="float64"))
    assert_close(layer(X, mask=np.ones_like(MASK)), layer(X).data)


# Dropout


@ALL
def test_dropout_is_of_an_input_and_of_the_output_before_the_same_in_all_steps(cls):
    layer = filled(cls(UNITS, return_sequences=True, dropout=0.4, recurrent_dropout=0.6, dtype="float64", name="r"))
    kept, kept_outputs = (
        dt.ops.dropout(np.ones((SAMPLES, length)), rate=rate, key=(0, "dropout", f"r/{name}", 7), first=10)
        for length, rate, name in ((LENGTH, 0.4, "dropout"), (UNITS, 0.6, "recurrent_dropout"))
    )
    assert (kept == 0).any()
    assert (kept_outputs == 0).any()
    with running(Step(training=True, number=7, first=10)):
        y = layer(X)
    assert_close(y, expected(layer, X * kept[:, None], drop=kept_outputs)[0])
    assert_close(layer(X), expected(layer, X)[0])  # not training


@ALL
def test_a_samples_dropout_follows_its_place_in_the_batch(cls):
    layer = filled(cls(UNITS, dropout=0.5, recurrent_dropout=0.5, dtype="float64", name="r"))

    def part(first, x):
        with running(Step(training=True, number=1, first=first)):
            return layer(x).data

    whole = part(0, X)
    assert_close(Tensor(part(1, X[1:])), whole[1:])
    assert not np.array_equal(part(2, X[1:]), whole[1:])


# Masks that follow Tensors

SENTENCES = np.array([[5, 3, 7, 2, 0, 0], [1, 4, 0, 0, 0, 0], [6, 5, 4, 3, 2, 1]])


@ALL
@pytest.mark.parametrize("wrap", [lambda layer: layer, layers.Bidirectional])
def test_what_is_padded_does_not_count_whatever_there_is_in_between(cls, wrap):
    model = dt.Sequential(
        [
            layers.Embedding(8, 3, mask_zero=True),
            layers.Dropout(0.5),
            layers.Dense(4, activation="tanh"),
            layers.LayerNormalization(),
            dt.Sequential([layers.Activation("tanh"), wrap(cls(3, return_sequences=True))]),
            wrap(cls(UNITS)),
        ]
    )
    padded = model(SENTENCES).data
    for sentence, y in zip(SENTENCES, padded, strict=True):
        alone = model(sentence[None, sentence != 0]).data[0]
        # float32: two layers of up to 6 steps, each of some 30 roundings of numbers below 1, and factors below 10
        np.testing.assert_allclose(y, alone, rtol=0, atol=2 * 6 * 300 * 2**-24)


def test_zeros_count_where_nobody_says_otherwise():
    embedding = layers.Embedding(8, 3)
    lstm = layers.LSTM(2)
    x = embedding(SENTENCES)
    assert mask.mask_of(x) is None
    assert not np.array_equal(lstm(x).data, lstm(x, mask=SENTENCES != 0).data)


def test_a_mask_that_is_given_comes_before_the_one_that_follows():
    x = layers.Embedding(8, 3, mask_zero=True)(SENTENCES)
    gru = filled(layers.GRU(2), x)
    every = np.ones(SENTENCES.shape, bool)
    np.testing.assert_array_equal(gru(x, mask=every).data, gru(Tensor(x.data), mask=every).data)
    assert not np.array_equal(gru(x).data, gru(x, mask=every).data)


def test_masks_are_told_by_compute_mask():
    embedding = layers.Embedding(8, 3, mask_zero=True)
    made = mask.mask_of(embedding(SENTENCES))
    np.testing.assert_array_equal(made.data, SENTENCES != 0)
    np.testing.assert_array_equal(embedding.compute_mask(SENTENCES), SENTENCES != 0)
    x = np.ones((*SENTENCES.shape, 3))
    for layer, its in (
        (layers.LSTM(1), None),
        (layers.LSTM(1, return_sequences=True), made.data),
        (layers.GRU(1, return_sequences=True, go_backwards=True), made.data[:, ::-1]),
        (layers.Bidirectional(layers.GRU(1, return_sequences=True)), made.data),
        (layers.Bidirectional(layers.GRU(1)), None),
        (layers.Dense(1), made.data),
    ):
        found = layer.compute_mask(x, made)
        assert (found is None) == (its is None)
        if its is not None:
            np.testing.assert_array_equal(found.data, its)


def test_a_layer_that_ends_a_mask_says_so_once(caplog):
    x = layers.Embedding(8, 3, mask_zero=True)(SENTENCES)
    flat = layers.Flatten(name="flat")
    for _ in range(2):
        assert mask.mask_of(flat(x)) is None
    (told,) = [record.message for record in caplog.records]
    assert told.startswith("layer 'flat' (Flatten) does not know masks: it uses steps that are to be left out")
    caplog.clear()
    dt.Sequential([layers.LSTM(2), layers.Dense(1)])(x)
    assert not caplog.records


def test_masks_go_with_their_tensors():
    gc.collect()
    before = len(mask._masks)
    x = layers.Embedding(8, 3, mask_zero=True)(SENTENCES)
    y = layers.Dense(2)(x)
    assert len(mask._masks) == before + 2
    del x, y
    gc.collect()
    assert len(mask._masks) == before


def test_masking_leaves_out_steps_of_a_value():
    x = np.array([[[1.0, 2], [7, 7], [7, 1]], [[7, 7], [7, 7], [0, 0]]])
    layer = layers.Masking(7.0, dtype="float64")
    y = layer(x)
    np.testing.assert_array_equal(mask.mask_of(y).data, [[True, False, True], [False, False, True]])
    np.testing.assert_array_equal(y.data, [[[1, 2], [0, 0], [7, 1]], [[0, 0], [0, 0], [0, 0]]])
    given = Tensor(x, requires_grad=True)
    layer(given).sum().backward()
    np.testing.assert_array_equal(given.grad, np.repeat([[[1], [0], [1]], [[0], [0], [1]]], 2, axis=2))
    assert layers.Masking(**layer.get_config()).get_config() == layer.get_config()


# Bidirectional


@ALL
@pytest.mark.parametrize("sequences", [True, False])
@pytest.mark.parametrize("masked", [None, MASK])
@pytest.mark.parametrize("mode", ["concat", "sum", "mul", "ave", None])
def test_bidirectional_is_two_layers(cls, sequences, masked, mode):
    layer = layers.Bidirectional(cls(UNITS, return_sequences=sequences, dtype="float64"), mode, dtype="float64")
    filled(layer)
    one, other = layer.forward_layer, layer.backward_layer
    forwards, backwards = (expected(each, X, mask=masked)[0] for each in (one, other))
    pair = (forwards, backwards[:, ::-1]) if sequences else (forwards[:, -1], backwards[:, -1])
    y = layer(X, mask=masked)
    if mode is None:
        for each, its in zip(y, pair, strict=True):
            assert_close(each, its)
        return
    merged = {"concat": lambda a, b: np.concatenate([a, b], -1), "sum": np.add, "mul": np.multiply}
    assert_close(y, merged.get(mode, lambda a, b: (a + b) / 2)(*pair))
    if sequences and masked is not None:
        assert not y.data[~masked].any()
    if mode == "mul":
        check_grads(lambda x: layer(x, mask=masked), X)


@ALL
def test_bidirectional_takes_and_returns_the_states_of_both(cls):
    layer = layers.Bidirectional(cls(UNITS, return_state=True, dtype="float64"), dtype="float64")
    filled(layer)
    begin = [*begin_of(cls), *[2 * each for each in begin_of(cls)]]
    y, *states = layer(X, initial_state=begin)
    half = len(begin) // 2
    theirs = [expected(layer.forward_layer, X, begin[:half]), expected(layer.backward_layer, X, begin[half:])]
    assert_close(y, np.concatenate([each[0][:, -1] for each in theirs], -1))
    for state, its in zip(states, [*theirs[0][1:], *theirs[1][1:]], strict=True):
        assert_close(state, its)


def test_bidirectional_has_keras_names_and_the_arguments_of_its_layer():
    layer = layers.Bidirectional(layers.LSTM(3, dropout=0.1), name="b")
    layer(X)
    assert [w.name for w in layer.weights] == [
        f"b/{direction}_lstm/{name}"
        for direction in ("forward", "backward")
        for name in ("kernel", "recurrent_kernel", "bias")
    ]
    assert layer.backward_layer.go_backwards
    assert layer.forward_layer.dropout == layer.backward_layer.dropout == 0.1
    assert layer(X).shape == (SAMPLES, 6)
    assert not np.array_equal(layer.weights[0].data, layer.weights[3].data)
    named = layers.Bidirectional(layers.GRU(3, name="g"), backward_layer=layers.GRU(2, go_backwards=True, name="h"))
    assert (named.forward_layer.name, named.backward_layer.name) == ("forward_g", "backward_h")
    assert named(X).shape == (SAMPLES, 5)


# In models


def model_of(static="auto"):
    """Return a classifier of sequences of indices with everything in it that could depend on how a batch is shared."""
    model = dt.Sequential(
        [
            layers.Embedding(17, 6, mask_zero=True, input_shape=(8,)),
            layers.Bidirectional(layers.LSTM(4, return_sequences=True, dropout=0.2, recurrent_dropout=0.3)),
            layers.GRU(5, return_sequences=True, go_backwards=True, recurrent_dropout=0.2),
            layers.SimpleRNN(5, dropout=0.1),
            layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy", ["accuracy"], static=static)
    return model


def sentences():
    x, y = worlds.digits(30)
    return np.rint(x[:, :, 3, 0] * 16).astype(np.int64), y


def train(static="auto", **how):
    model = model_of(static)
    history = model.fit(*sentences(), 12, 2, verbose=0, **how)
    return dt.state_digest(model), history.history, model


def test_plans_compute_what_eager_steps_do():
    eager, planned = worlds.alone(lambda comm: (train(False), train(True)))
    assert planned[:2] == eager[:2]


@pytest.mark.timeout(60)
def test_weights_have_the_same_bits_on_any_number_of_workers():
    alone = worlds.alone(lambda comm: train(shards=4)[:2])
    assert threads.run(2, lambda comm: train(shards=4)[:2]) == [alone] * 2


def test_a_model_that_was_saved_is_loaded(tmp_path):
    def work(comm):
        model = train()[2]
        model.save(tmp_path)
        again = dt.load_model(tmp_path)
        assert again.get_config() == model.get_config()
        np.testing.assert_array_equal(again.predict(sentences()[0]), model.predict(sentences()[0]))

    worlds.alone(work)


def test_a_model_of_ones_own_passes_states_and_masks_on():
    class Translator(dt.Model):
        def __init__(self):
            super().__init__()
            self.embedding = layers.Embedding(17, 6, mask_zero=True)
            self.encoder = layers.LSTM(5, return_state=True)
            self.decoder = layers.LSTM(5, return_sequences=True)
            self.head = layers.Dense(10)

        def call(self, x):
            embedded = self.embedding(x)
            _, *states = self.encoder(embedded)
            return self.head(self.decoder(embedded, initial_state=states)[:, -1])

    def work(comm):
        digests = []
        for static in (False, True):
            model = Translator()
            loss = dt.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile(dt.optimizers.Adam(0.02), loss, static=static)
            history = model.fit(*sentences(), 30, 40, verbose=0).history["loss"]
            assert history[-1] < 0.5 * history[0]
            digests.append(dt.state_digest(model))
        return digests

    eager, planned = worlds.alone(work)
    assert planned == eager


@pytest.mark.skipif(native("lstm") is None, reason="no native kernels here")
@pytest.mark.parametrize(
    ("options", "is_native"),
    [
        ({}, True),
        ({"go_backwards": True}, True),
        ({"dropout": 0.5}, True),
        ({"recurrent_dropout": 0.5}, False),
        ({"activation": "relu"}, False),
    ],
)
@pytest.mark.parametrize("cls", [layers.LSTM, layers.GRU])
def test_kernels_compute_where_they_apply(cls, options, is_native):
    def work(comm):
        model = dt.Sequential([cls(3, **options, input_shape=(4, 2)), layers.Dense(1)])
        model.compile("sgd", "mse")
        x = np.random.default_rng(0).standard_normal((6, 4, 2))
        for _ in range(3):
            model.train_on_batch(x, np.zeros((6, 1)))
        (plan,) = model._replica_among(comm).steps[0].training.plans.values()
        return {row.name for row in plan.rows()}

    names = worlds.alone(work)
    assert (f"_{cls.__name__.lower()}" in names) == is_native
    assert (f"_{cls.__name__.lower()}_gradient" in names) == is_native


# What is refused


@ALL
def test_wrong_states_and_masks_are_errors(cls):
    layer = filled(cls(UNITS, name="r"))
    states = KINDS[cls][1]
    with pytest.raises(
        ShapeError, match=rf"'r' \({cls.__name__}\): expected initial_state as {states} of shape \(3, 2\)"
    ):
        layer(X, initial_state=[np.zeros((SAMPLES, UNITS))] * (states + 1))
    with pytest.raises(ShapeError, match=r"received \[\(3, 1\)"):
        layer(X, initial_state=[np.zeros((SAMPLES, 1))] * states)
    for wrong, received in ((MASK[:, :2], r"bool \(3, 2\)"), (MASK[0], r"bool \(5,\)"), (1.0 * MASK, "float64")):
        with pytest.raises(ShapeError, match=rf"'r' .*bool or integers of shape \(3, 5\), received {received}"):
            layer(X, mask=wrong)
    with pytest.raises(ConfigError, match=f"{cls.__name__}: stateful=True is not offered.*initial_state"):
        cls(2, stateful=True)
    for name in ("dropout", "recurrent_dropout"):
        with pytest.raises(ConfigError, match="rate must be from 0 to below 1, not 1"):
            cls(2, **{name: 1})


def test_layers_that_do_not_make_a_pair_are_refused():
    gru = layers.GRU(2)
    for layer, options, message in (
        (layers.Dense(2), {}, "expected a recurrent layer, as LSTM"),
        (gru, {"backward_layer": layers.Dense(2)}, "expected a recurrent layer, as LSTM"),
        (gru, {"merge_mode": "add"}, "merge_mode is one of concat, sum, mul, ave or None, not 'add'"),
        (gru, {"backward_layer": layers.GRU(2)}, "go_backwards is False in layer and False in backward_layer"),
        (
            gru,
            {"backward_layer": layers.GRU(2, go_backwards=True, return_sequences=True)},
            "return_sequences is False in layer and True in backward_layer",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            layers.Bidirectional(layer, **options)


def test_a_simple_rnn_makes_itself_again():
    layer = layers.SimpleRNN(3, "relu", use_bias=False, recurrent_dropout=0.5, name="s")
    assert layers.SimpleRNN(**layer.get_config()).get_config() == layer.get_config()
    layer(X)
    assert [(w.name, w.shape) for w in layer.weights] == [("s/kernel", (4, 3)), ("s/recurrent_kernel", (3, 3))]
