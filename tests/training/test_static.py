"""A model trains to the same bits by a plan as eagerly, on any number of ranks; what cannot be planned is said."""

import logging
import sys

import numpy as np
import pytest

import disttrain as dt
from disttrain.comm import threads
from disttrain.errors import ConfigError
from tests.training import worlds

pytestmark = pytest.mark.timeout(60)

L = dt.layers


def images(samples=22):
    generator = np.random.default_rng(3)
    return generator.random((samples, 8, 8, 1)), generator.integers(0, 4, samples)


def convolutional():
    return dt.Sequential(
        [
            L.Conv2D(4, 3, padding="same", activation="relu", input_shape=(8, 8, 1)),
            L.BatchNormalization(),
            L.MaxPooling2D(),
            L.Conv2D(6, 2, strides=2, activation="tanh"),
            L.AveragePooling2D(),
            L.Flatten(),
            L.Dropout(0.3),
            L.Dense(4, activation="softmax"),
        ]
    )


def train(comm, static, loss="sparse_categorical_crossentropy", make=convolutional, to_targets=lambda y: y, **options):
    x, y = images()
    model = make()
    model.compile("adam", loss, ["accuracy"], static=static)
    history = model.fit(x, to_targets(y), batch_size=6, epochs=4, verbose=0, **options)
    plans = model._replicas[comm].steps[0].training.plans
    return dt.state_digest(model), history.history, len(plans)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_plan_gives_the_bits_of_eager_steps(world_size):
    planned = threads.run(world_size, train, True)
    eager = threads.run(world_size, train, False)
    assert [r[:2] for r in planned] == [r[:2] for r in eager]
    assert [r[2] for r in planned] == [2] * world_size  # whole batches, and the short last one
    assert [r[2] for r in eager] == [0] * world_size


class Unused(dt.Model):
    """A layer whose outputs nobody uses, beside one whose outputs are the model's."""

    def __init__(self):
        super().__init__()
        self.flat = L.Flatten()
        self.idle = L.Dense(5)
        self.head = L.Dense(4, activation="softmax")

    def call(self, x):
        x = self.flat(x)
        self.idle(x)
        return self.head(x)


@pytest.mark.parametrize("how", [{}, {"shards": 2}], ids=["plain", "in shards"])
def test_a_weight_without_a_gradient_stays_as_it_is(how):
    planned = threads.run(2, train, True, make=Unused, **how)
    eager = threads.run(2, train, False, make=Unused, **how)
    assert [r[:2] for r in planned] == [r[:2] for r in eager]
    assert [r[2] for r in planned] == [2, 2]


def dense(outputs, activation):
    return lambda: dt.Sequential([L.Flatten(input_shape=(8, 8, 1)), L.Dense(outputs, activation=activation)])


@pytest.mark.parametrize(
    ("loss", "outputs", "activation", "to_targets"),
    [
        ("categorical_crossentropy", 4, "softmax", lambda y: dt.utils.to_categorical(y, 4)),
        (dt.losses.SparseCategoricalCrossentropy(from_logits=True), 4, None, lambda y: y),
        ("binary_crossentropy", 1, "sigmoid", lambda y: y % 2),
        ("mse", 1, None, lambda y: y.astype(float)),
        (lambda y_true, y_pred: ((y_pred - y_true.reshape(-1, 1)) ** 2).mean(), 1, "relu", lambda y: y),
    ],
)
def test_every_loss_can_be_planned(loss, outputs, activation, to_targets):
    options = {"loss": loss, "make": dense(outputs, activation), "to_targets": to_targets}
    (planned,), (eager,) = (threads.run(1, train, static, **options) for static in ("auto", False))
    assert planned[:2] == eager[:2]


@pytest.mark.parametrize(
    "loss",
    [
        lambda y_true, y_pred: ((y_pred - y_true.reshape(-1, 1)) ** 2).mean(),
        lambda y_true, y_pred: ((y_pred - np.asarray(y_true).reshape(-1, 1)) ** 2).mean(),
    ],
)
def test_targets_that_are_equal_at_first_are_not_taken_for_constants(loss):
    x, y = worlds.blobs()
    y = np.concatenate([np.zeros(40, int), np.arange(20)])  # the first batches have the same targets
    x = np.resize(x, (60, *x.shape[1:]))

    def run(static):
        model = dt.Sequential([L.Dense(1)])
        model.compile("sgd", loss, static=static)
        model.fit(x, y, batch_size=10, shuffle=False, verbose=0)
        return dt.state_digest(model)

    assert run("auto") == run(False)


class Undecided(dt.Model):
    """A model whose calls depend on a value."""

    def __init__(self):
        super().__init__()
        self.flatten, self.dense = L.Flatten(), L.Dense(4, activation="softmax")

    def call(self, x):
        y = self.dense(self.flatten(x))
        return y if float(y.sum()) > 1e9 else y * 1.0


def test_a_model_that_depends_on_values_stays_eager_and_says_so_once(caplog):
    with caplog.at_level(logging.WARNING, "disttrain"):
        ((digest, _, plans),) = threads.run(1, train, "auto", make=Undecided)
    assert plans == 0
    assert [r.getMessage() for r in caplog.records] == [
        "the step is not static, and runs eagerly: Python looked at a value, by float()"
    ]
    assert digest == threads.run(1, train, False, make=Undecided)[0][0]


def test_static_true_refuses_such_a_model():
    with pytest.raises(ConfigError, match=r"not static: Python looked at a value, by float\(\).*static='auto'"):
        threads.run(1, train, True, make=Undecided)


def test_a_layer_that_a_callback_changes_is_noticed_at_the_next_epoch():
    class LessDropout(dt.callbacks.Callback):
        def on_epoch_end(self, epoch, logs):
            self.model.layers[6].rate = 0.1

    (planned,), (eager,) = (threads.run(1, train, static, callbacks=[LessDropout()]) for static in ("auto", False))
    assert planned[:2] == eager[:2]
    assert planned[2] == 2


def test_a_loss_with_a_tensor_of_the_users_own_stays_eager():
    x, y = worlds.blobs()
    scale = dt.Tensor(np.array(1.0, "float32"), requires_grad=True)
    model = dt.Sequential([L.Dense(1)])
    model.compile("sgd", lambda y_true, y_pred: ((y_pred * scale) ** 2).mean())
    before = []
    for _ in range(4):
        model.train_on_batch(x, y)
        before.append(float(scale.grad))
    assert len(set(before)) == 4  # its gradient is computed in every step


def test_weights_that_were_loaded_are_what_a_plan_works_on(tmp_path):
    x, y = images()
    model = convolutional()
    model.compile("sgd", "sparse_categorical_crossentropy", static=True)
    model.fit(x, y, batch_size=11, epochs=2, verbose=0)
    model.save(tmp_path)
    after = [model.train_on_batch(x[:11], y[:11]) for _ in range(2)]
    model.load(tmp_path)
    model.optimizer.iterations = 4
    assert [model.train_on_batch(x[:11], y[:11]) for _ in range(2)] == after


def test_the_plan_can_be_printed(capsys):
    x, y = images()
    model = convolutional()
    model.compile("adam", "sparse_categorical_crossentropy")
    model.plan()
    assert "no plan" in capsys.readouterr().out
    model.fit(x, y, batch_size=11, verbose=0)
    model.plan()
    printed = capsys.readouterr().out
    for part in ("conv2d", "_matmul", "gradient of", "dense/kernel", "GFLOP", "Arena:"):
        assert part in printed


def test_the_plan_can_be_drawn(tmp_path, monkeypatch):
    x, y = images()
    model = convolutional()
    model.compile("adam", "sparse_categorical_crossentropy")
    with pytest.raises(ConfigError, match="no plan"):
        model.plan(to_file=tmp_path / "plan.svg")
    model.fit(x, y, batch_size=11, verbose=0)
    model.plan(to_file=tmp_path / "plan.svg")
    drawn = (tmp_path / "plan.svg").read_text()
    blocks = next(iter(model._replicas.values())).steps[0].training.plans.values()
    assert drawn.count("PolyCollection") == sum(len(plan.blocks) for plan in blocks)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install disttrain\[plot\]"):
        model.plan(to_file=tmp_path / "plan.svg")


@pytest.mark.parametrize("world_size", [1, 2])
def test_native_kernels_give_a_plan_the_bits_that_they_give_eager_steps(world_size):
    # float32 and enough channels, so that convolution, pooling, relu's gradient and Adam run natively where they can
    def make():
        return dt.Sequential(
            [
                L.Conv2D(8, 3, activation="relu", input_shape=(8, 8, 1)),
                L.Conv2D(16, 3, padding="same", activation="relu"),
                L.MaxPooling2D(),
                L.AveragePooling2D(padding="same"),
                L.Flatten(),
                L.Dense(4, activation="softmax"),
            ]
        )

    planned, eager = (threads.run(world_size, train, static, make=make) for static in (True, False))
    assert [r[:2] for r in planned] == [r[:2] for r in eager]


def test_predictions_are_planned_and_are_those_of_the_model():
    x, y = images(50)
    model = convolutional()
    model.compile("adam", "sparse_categorical_crossentropy")

    def eagerly():
        with dt.no_grad():
            return np.concatenate([model(x[at : at + 8], training=False).numpy() for at in range(0, 50, 8)])

    for _ in range(3):
        np.testing.assert_array_equal(model.predict(x, batch_size=8), eagerly())
        model.fit(x, y, batch_size=25, verbose=0)
    assert [shape for ((shape, _), _) in model._prediction.replay.plans] == [(8, 8, 8, 1), (2, 8, 8, 1)]


def test_a_layer_that_changes_between_predictions_is_noticed():
    x, _ = images(40)
    model = convolutional()
    before = model.predict(x, batch_size=8)
    model.layers[-1]._function = dt.ops.sigmoid
    after = model.predict(x, batch_size=8)
    assert not np.array_equal(before, after)
    with dt.no_grad():
        np.testing.assert_array_equal(after[:8], model(x[:8], training=False).numpy())


def test_evaluation_is_planned_and_gives_the_same_numbers():
    x, y = images(50)
    model, eager = convolutional(), convolutional()
    model.compile("adam", "sparse_categorical_crossentropy", ["accuracy"])
    eager.compile("adam", "sparse_categorical_crossentropy", ["accuracy"], static=False)
    for _ in range(2):
        assert model.evaluate(x, y, batch_size=8) == eager.evaluate(x, y, batch_size=8)
        for each in (model, eager):
            each.fit(x, y, batch_size=25, verbose=0)
    (replica,) = model._replicas.values()
    assert [key[0][0] for key in replica.steps[0].evaluation.plans] == [(8, 8, 8, 1), (2, 8, 8, 1)]
