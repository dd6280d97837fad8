"""Shards of a rank that are computed at once: the bits of shards that are computed one after the other."""

import numpy as np
import pytest

import disttrain as dt
from disttrain.autodiff.plan import Plan
from disttrain.comm import threads
from disttrain.data_parallel import GradientSum
from disttrain.kernels.library import chosen
from tests.training import worlds

LAYERS = dt.layers
BATCH, SHARDS = 24, 8

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(not chosen().functions, reason="without native kernels shards are computed one by one"),
]


def perceptron():
    """Return dense layers with dropout between them."""
    layers = [
        LAYERS.Dense(33, activation="relu", input_shape=(64,)),
        LAYERS.Dropout(0.3),
        LAYERS.Dense(17, activation="relu"),
        LAYERS.Dense(10, activation="softmax"),
    ]
    x, y = worlds.digits(5 * BATCH)
    return dt.Sequential(layers), x.reshape(len(x), -1), y


def conv_net():
    """Return convolutions of both kinds, pools, and batch normalization over the batch."""
    layers = [
        LAYERS.Conv2D(16, 3, padding="same", use_bias=False, input_shape=(8, 8, 1)),
        LAYERS.BatchNormalization(),
        LAYERS.Activation("relu"),
        LAYERS.Conv2D(16, 3, padding="same", activation="relu"),
        LAYERS.MaxPooling2D(2),
        LAYERS.BatchNormalization(momentum=0.5),
        LAYERS.GlobalAveragePooling2D(),
        LAYERS.Dense(10, activation="softmax"),
    ]
    return dt.Sequential(layers), *worlds.digits(5 * BATCH)


class Transformer(dt.Model):
    """An embedding, causal attention, layer normalization and gelu, with a sum around each."""

    def __init__(self):
        super().__init__()
        self.embedding = LAYERS.Embedding(17, 16)
        self.attention = LAYERS.MultiHeadAttention(2, 8)
        self.norms = [LAYERS.LayerNormalization(), LAYERS.LayerNormalization()]
        self.wide = LAYERS.Dense(32, activation="gelu")
        self.narrow = LAYERS.Dense(16)
        self.head = LAYERS.Dense(10, activation="softmax")

    def call(self, x):
        x = self.embedding(x)
        normed = self.norms[0](x)
        x = x + self.attention(normed, normed, use_causal_mask=True)
        x = x + self.narrow(self.wide(self.norms[1](x)))
        return self.head(x[:, -1])


def transformer():
    x, y = worlds.digits(5 * BATCH)
    return Transformer(), np.rint(x[:, :, 3, 0] * 16).astype(np.int64), y


def mixed():
    """Return layers of which some are computed for each shard: an LSTM, a function that may round otherwise."""
    layers = [
        LAYERS.Dense(12, activation="relu", input_shape=(8, 8)),
        LAYERS.LSTM(9),
        LAYERS.LayerNormalization(),
        LAYERS.Dense(11, activation="tanh"),
        LAYERS.Dense(10, activation="softmax"),
    ]
    x, y = worlds.digits(5 * BATCH)
    return dt.Sequential(layers), x[..., 0], y


def own_statistics():
    """Return batch normalization by the samples of each shard."""
    layers = [
        LAYERS.Dense(16, activation="relu", input_shape=(64,)),
        LAYERS.BatchNormalization(synchronized=False, momentum=0.5),
        LAYERS.Dense(10, activation="softmax"),
    ]
    x, y = worlds.digits(5 * BATCH)
    return dt.Sequential(layers), x.reshape(len(x), -1), y


def train(_comm, build, static="auto"):
    """Return what must be equal, and the plans of all shards of this rank."""
    model, x, y = build()
    x = x.astype(x.dtype if x.dtype.kind == "i" else np.float32)
    model.compile(dt.optimizers.Adam(0.01), "sparse_categorical_crossentropy", ["accuracy"], static=static)
    history = model.fit(x, y, BATCH, 2, verbose=0, shards=SHARDS)
    (replica,) = model._replicas.values()
    return (dt.state_digest(model), history.history), list(replica._sharded._plans.values())


MODELS = [perceptron, conv_net, transformer, mixed, own_statistics]


@pytest.mark.parametrize("build", MODELS)
def test_shards_at_once_have_the_bits_of_shards_one_by_one(build):
    expected, plans = worlds.alone(train, build, False)
    assert plans == []
    got, plans = worlds.alone(train, build)
    assert [type(plan) for plan in plans] == [Plan]
    assert got == expected


@pytest.mark.parametrize("world_size", [2, 3, 5, 8])
def test_on_any_number_of_workers(world_size):
    expected, _ = worlds.alone(train, conv_net, False)
    found = threads.run(world_size, train, conv_net)
    assert all(got == expected for got, _ in found)
    planned = [any(isinstance(plan, Plan) for plan in plans) for _, plans in found]
    assert planned == [len(range(rank, SHARDS, world_size)) > 1 for rank in range(world_size)]


@pytest.mark.parametrize("build", [perceptron, conv_net])
def test_gradients_are_early_where_sums_wait_for_that(build, monkeypatch):
    expected, _ = worlds.alone(train, build, False)
    called = []
    monkeypatch.setattr(GradientSum, "meanwhile", property(lambda _: lambda: called.append(1)))
    got, plans = worlds.alone(train, build)
    assert [type(plan) for plan in plans] == [Plan]
    assert called
    assert got == expected


@dt.op
def doubled(x):
    """Return twice `x`: an op of which nobody has said what it makes of joined arrays."""
    return x + x


@doubled.vjp
def _(g, _y, _x):
    return (g + g,)


def test_an_op_without_a_rule_keeps_shards_apart():
    class Doubled(LAYERS.Layer):
        def call(self, x):
            return doubled(x)

    def build():
        model, x, y = perceptron()
        return dt.Sequential([Doubled(input_shape=(64,)), model]), x, y

    expected, _ = worlds.alone(train, build, False)
    got, plans = worlds.alone(train, build)
    assert plans == [None]
    assert got == expected


@pytest.mark.parametrize("shape", [(33,), (1, 33)])
def test_dropout_of_what_all_shards_have_keeps_them_apart(shape):
    class Positions(LAYERS.Layer):
        def build(self, input_shape):
            self.drop = LAYERS.Dropout(0.5, name="drop")
            self.positions = self.add_weight("positions", shape)

        def call(self, x):
            return x + self.drop(self.positions)

    def build():
        x, y = worlds.digits(4 * BATCH)
        layers = [LAYERS.Dense(33, input_shape=(64,)), Positions(), LAYERS.Dense(10, activation="softmax")]
        model = dt.Sequential(layers)
        return model, x.reshape(len(x), -1), y

    expected, _ = worlds.alone(train, build, False)
    got, plans = worlds.alone(train, build)
    assert plans == [None]  # one mask would be drawn for all of them, from other places
    assert got == expected


def test_dropout_of_what_is_computed_for_each_shard_keeps_shards_apart():
    def build():
        layers = [
            LAYERS.Dense(12, activation="tanh", input_shape=(64,)),
            LAYERS.Dropout(0.5),
            LAYERS.Dense(10, activation="softmax"),
        ]
        x, y = worlds.digits(5 * BATCH)
        return dt.Sequential(layers), x.reshape(len(x), -1), y

    expected, _ = worlds.alone(train, build, False)
    got, plans = worlds.alone(train, build)
    assert plans == [None]  # a mask follows from a sample's place, and a shard's first one has another
    assert got == expected


def test_a_number_in_memory_may_change_from_step_to_step():
    def scaled(_comm, static):
        model, x, y = perceptron()
        optimizer = dt.optimizers.LossScaleOptimizer(dt.optimizers.SGD(0.1), 1.0, dynamic_growth_steps=1)
        model.compile(optimizer, "sparse_categorical_crossentropy", static=static)
        model.fit(x.astype(np.float32), y, BATCH, 2, verbose=0, shards=SHARDS)
        (replica,) = model._replicas.values()
        return (dt.state_digest(model), optimizer.dynamic_scale), list(replica._sharded._plans.values())

    expected, _ = worlds.alone(scaled, False)
    got, plans = worlds.alone(scaled, "auto")
    assert [type(plan) for plan in plans] == [Plan]
    assert got == expected
    assert got[1] == 2.0**10
