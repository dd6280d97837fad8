"""The same bits on any number of workers."""

import functools

import numpy as np
import pytest

import disttrain as dt
from disttrain.comm import threads
from disttrain.errors import CheckpointError, CommError, ConfigError, NonFiniteError
from tests.training import worlds

pytestmark = pytest.mark.timeout(120)

WORLD_SIZES = [1, 2, 3, 4, 5, 8]
LAYERS = dt.layers


def conv_net():
    """Return convolutions, batch normalization, dropout, pooling, and data in batches of 13, 13, 13, 8."""
    return worlds.conv_net(dt.optimizers.Adam(0.01), ["accuracy", "f1_score"]), *worlds.digits(47), 13


def frozen_statistics():
    """Return a net with batch normalization of each shard, beside some of the whole batch."""
    model = dt.Sequential(
        [
            LAYERS.BatchNormalization(momentum=0.5, synchronized=False, input_shape=(4,)),
            LAYERS.Dense(6, activation="relu"),
            LAYERS.BatchNormalization(),
            LAYERS.Dense(3, activation="softmax"),
        ]
    )
    model.compile(dt.optimizers.SGD(0.1, momentum=0.9), "sparse_categorical_crossentropy")
    return model, *worlds.blobs(50), 20


def recurrent():
    """Return an LSTM with dropout after it."""
    model = dt.Sequential(
        [LAYERS.LSTM(5, input_shape=(8, 8)), LAYERS.Dropout(0.4), LAYERS.Dense(10, activation="softmax")]
    )
    model.compile("adam", "sparse_categorical_crossentropy", ["accuracy"])
    x, y = worlds.digits(41)
    return model, x[..., 0], y, 17


class Block(dt.Model):
    """An embedding, attention with dropout of its weights, and layer normalization."""

    def __init__(self):
        super().__init__()
        self.embedding = LAYERS.Embedding(17, 8)
        self.attention = LAYERS.MultiHeadAttention(2, 4, dropout=0.2)
        self.norm = LAYERS.LayerNormalization()
        self.flat = LAYERS.Flatten()
        self.head = LAYERS.Dense(10, activation="softmax")

    def call(self, x):
        embedded = self.embedding(x)
        return self.head(self.flat(self.norm(embedded + self.attention(embedded, embedded))))


def attention():
    model = Block()
    model.compile(dt.optimizers.AdamW(0.01), "sparse_categorical_crossentropy", ["accuracy"])
    x, y = worlds.digits(30)
    return model, np.rint(x[:, :, 3, 0] * 16).astype(np.int64), y, 12


MODELS = [conv_net, frozen_statistics, recurrent, attention]


def train(_comm, build, *, epochs=3, static="auto", **how):
    """Return all that must be equal."""
    model, x, y, batch_size = build()
    model._static = static
    history = model.fit(x, y, batch_size, epochs, verbose=0, validation_split=0.2, **how)
    return {
        "digest": dt.state_digest(model),
        "history": {name: np.array(values) for name, values in history.history.items()},
        "evaluate": model.evaluate(x, y, batch_size=7, return_dict=True),
        "optimizer": [slot.tobytes() for slots in model.optimizer.slots for slot in slots.values()],
    }


@functools.cache
def on_one_worker(build, shards):
    return worlds.alone(lambda comm: train(comm, build, shards=shards))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("build", MODELS)
def test_weights_and_history_are_the_same_on_any_number_of_workers(build, world_size):
    for result in threads.run(world_size, lambda comm: train(comm, build, reproducible=True)):
        np.testing.assert_equal(result, on_one_worker(build, 8))


@pytest.mark.parametrize("build", MODELS)
def test_plans_compute_what_eager_steps_do(build):
    for static in (False, True):
        result = threads.run(3, lambda comm, static=static: train(comm, build, shards=8, static=static))[0]
        np.testing.assert_equal(result, on_one_worker(build, 8))


@pytest.mark.parametrize("shards", [1, 5, 12, 20])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_any_number_of_shards(shards, world_size):
    # batches of 13 and 11 samples: cut into 20, some shards have none
    result = threads.run(world_size, lambda comm: train(comm, conv_net, shards=shards))[-1]
    np.testing.assert_equal(result, on_one_worker(conv_net, shards))


def test_without_it_the_number_of_workers_shows():
    one = worlds.alone(lambda comm: train(comm, conv_net))
    assert threads.run(3, lambda comm: train(comm, conv_net))[0]["digest"] != one["digest"]
    assert on_one_worker(conv_net, 8)["digest"] != on_one_worker(conv_net, 5)["digest"]


@pytest.mark.parametrize("build", [conv_net, recurrent, attention])
def test_it_is_the_model_that_is_trained_without(float64, build):
    # as in test_any_number_of_workers.py: float64 sums in another order, batch statistics among them
    def weights(comm, **how):
        model, x, y, batch_size = build()
        model.fit(x, y, batch_size, 2, verbose=0, **how)
        return worlds.weights(model)

    worlds.assert_close(worlds.alone(lambda comm: weights(comm, shards=8)), worlds.alone(weights), 1e-10)


def test_train_on_batch_goes_on_as_fit_did():
    def steps(comm):
        model, x, y, batch_size = conv_net()
        model.fit(x, y, batch_size, verbose=0, shards=8)
        model.train_on_batch(x[:11], y[:11])
        return dt.state_digest(model)

    assert len({*threads.run(1, steps), *threads.run(3, steps), *threads.run(5, steps)}) == 1


def test_a_fit_without_it_forgets_it():
    def twice(comm, **first):
        model, x, y, batch_size = conv_net()
        model.fit(x, y, batch_size, verbose=0, **first)
        return dt.state_digest(model)

    def after(comm):
        model, x, y, batch_size = conv_net()
        model.fit(x[:2], y[:2], 2, verbose=0, shards=2, epochs=1)
        fresh, *_ = conv_net()
        for weight, its in zip(model.weights, fresh.weights, strict=True):
            weight.data[...] = its.data
        model.compile(dt.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
        model.fit(x, y, batch_size, verbose=0)
        return dt.state_digest(model)

    assert threads.run(2, twice)[0] == threads.run(2, after)[0]


class Stop(dt.callbacks.Callback):
    def __init__(self, at):
        self.at = at

    def on_train_batch_end(self, batch, logs):
        if self.model.optimizer.iterations == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("sizes", [(1, 3, 2), (4, 1, 5), (2, 8, 1)])
def test_a_run_goes_on_with_the_same_bits_on_another_number_of_workers(tmp_path, sizes):
    def part(comm, stop):
        model, x, y, batch_size = conv_net()
        backup = dt.callbacks.BackupAndRestore(tmp_path, save_freq=1)
        # first, so that what was saved is the step before
        history = model.fit(x, y, batch_size, 3, verbose=0, callbacks=[Stop(stop), backup], shards=8)
        return dt.state_digest(model), history.history

    def whole(comm):
        model, x, y, batch_size = conv_net()
        history = model.fit(x, y, batch_size, 3, verbose=0, callbacks=[Stop(0)], shards=8)
        return dt.state_digest(model), history.history

    for size, stop in zip(sizes, (3, 8), strict=False):
        with pytest.raises(KeyboardInterrupt):
            threads.run(size, part, stop)
    for result in threads.run(sizes[-1], part, 0):
        np.testing.assert_equal(result, worlds.alone(whole))


def test_a_run_does_not_go_on_with_another_number_of_shards(tmp_path):
    def part(comm, shards):
        model, x, y, batch_size = conv_net()
        model.fit(x, y, batch_size, 1, verbose=0, callbacks=[dt.callbacks.BackupAndRestore(tmp_path)], shards=shards)

    worlds.alone(lambda comm: part(comm, 8))
    with pytest.raises(CheckpointError, match="shards 8, this run has 4"):
        worlds.alone(lambda comm: part(comm, 4))


def test_a_nan_leaves_the_weights_alone():
    def meet_it(comm):
        model, x, y, batch_size = conv_net()
        model.fit(x, y, batch_size, 2, verbose=0, shards=8)
        before = dt.state_digest(model)
        x[5] = np.nan
        with pytest.raises(NonFiniteError, match="at step 8"):
            model.fit(x, y, 47, verbose=0, shards=8)
        return before == dt.state_digest(model)

    assert all(threads.run(3, meet_it))


@pytest.mark.parametrize("shards", [0, -1, 2.5, True, "8"])
def test_a_wrong_number_of_shards_is_refused(shards):
    model, x, y, _ = conv_net()
    with pytest.raises(ConfigError, match="shards must be an integer of at least 1"):
        worlds.alone(lambda comm: model.fit(x, y, shards=shards))


def test_ranks_that_ask_for_other_shards_are_told():
    def fit(comm):
        model, x, y, _ = conv_net()
        model.fit(x, y, verbose=0, shards=4 + comm.rank)

    assert all(isinstance(error, CommError) for error in worlds.errors(2, fit))


class Wavering(dt.Model):
    """Normalizes what has more than one sample only: the calls of a shard depend on its size."""

    def __init__(self):
        super().__init__()
        self.norm = LAYERS.BatchNormalization()
        self.head = LAYERS.Dense(3, activation="softmax")

    def call(self, x):
        return self.head(self.norm(x) if x.shape[0] != 1 else x)


def test_shards_that_differ_in_their_calls_are_told():
    def fit(comm):
        model = Wavering()
        model.compile("sgd", "sparse_categorical_crossentropy")
        model.fit(*worlds.blobs(5), batch_size=5, verbose=0, shards=4)

    with pytest.raises(ConfigError, match="in one shard of it and not in another"):
        worlds.alone(fit)


@dt.op
def scaled(w, x):
    return x * w


@scaled.vjp
def _(g, _y, w, x):
    own = dt.ops.sum(g * x, axis=0)
    # in its rule, after the gradient of a parameter is there: other shards compute theirs meanwhile
    everybody_s = dt.layers.current_step().total(dt.ops.sum(g, axis=0))
    return own, g * w + 1e-3 * everybody_s


class Scale(dt.Layer):
    def build(self, input_shape):
        self.factor = self.add_weight("factor", input_shape[-1:], "ones")

    def call(self, x):
        return scaled(self.factor, x)


def test_a_shard_does_not_write_over_a_gradient_that_another_has_not_delivered_yet():
    def fit(comm, static):
        model = dt.Sequential([LAYERS.Dense(6, input_shape=(4,)), Scale(), LAYERS.Dense(3, activation="softmax")])
        model.compile("sgd", "sparse_categorical_crossentropy", static=static)
        model.fit(*worlds.blobs(80), batch_size=16, epochs=2, verbose=0, shards=8)
        return dt.state_digest(model)

    eager = worlds.alone(lambda comm: fit(comm, static=False))
    assert worlds.alone(lambda comm: fit(comm, static=True)) == eager
    assert set(threads.run(3, fit, True)) == {eager}
