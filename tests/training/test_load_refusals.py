"""What `load` and `load_model` cannot take over is named, and left as it was; the rest is taken over."""

import numpy as np
import pytest

import disttrain as dt
from disttrain.autodiff import ops
from disttrain.errors import CheckpointError
from tests.checkpoint import shelf
from tests.training import worlds

pytestmark = pytest.mark.timeout(30)

X, Y = worlds.blobs(20)


@pytest.mark.parametrize("name", ["os", "Path", "system", "Callback", "builtins.eval"])
def test_no_class_is_imported_because_a_file_names_it(tmp_path, name):
    described = worlds.dense_net().description()
    described["config"]["layers"][0]["class"] = name
    dt.checkpoint.save(tmp_path, {"model": {}}, {"model": described})
    with pytest.raises(CheckpointError, match=f"needs the class '{name}'"):
        dt.load_model(tmp_path)


def not_saved(**compiled):
    arguments = {"optimizer": "adam", "loss": "mse", "metrics": [], **compiled}

    def make():
        model = dt.Sequential([dt.layers.Dense(1, input_shape=(4,))])
        model.compile(**arguments)
        return model

    return make


class Threshold(dt.metrics.MeanAbsoluteError):
    name = "threshold"

    def __init__(self, name=None, rule=abs):
        super().__init__(name)
        self.rule = rule


@pytest.mark.parametrize(
    "make",
    [not_saved(optimizer=dt.optimizers.SGD(lambda step: 0.1)), not_saved(loss=lambda t, p: ops.sum((p - t) ** 2)),
     not_saved(metrics=[Threshold()])],
    ids=["schedule", "function as loss", "metric"],
)  # fmt: skip
def test_what_cannot_be_written_down_leaves_the_model_to_be_compiled_again(tmp_path, make):
    model = make()
    y = X[:, :1]
    model.fit(X, y, verbose=0)
    model.save(tmp_path)
    loaded = dt.load_model(tmp_path)
    assert dt.state_digest(loaded) == dt.state_digest(model)
    with pytest.raises(dt.errors.ConfigError, match="not compiled"):
        loaded.fit(X, y, verbose=0)
    # and in Python everything comes back
    again = make()
    again.load(tmp_path)
    for each in (model, again):
        each.fit(X, y, verbose=0)
    assert dt.state_digest(again) == dt.state_digest(model)


def test_a_layer_that_cannot_be_written_down_says_so(tmp_path):
    model = dt.Sequential([dt.layers.Dense(3, activation=lambda x: x * 2, input_shape=(4,))])
    model.save(tmp_path)
    with pytest.raises(CheckpointError, match=r"does not hold the arguments of Sequential, .*make the model in Python"):
        dt.load_model(tmp_path)
    again = dt.Sequential(
        [dt.layers.Dense(3, activation=lambda x: x * 2, kernel_initializer="zeros", input_shape=(4,))]
    )
    again.load(tmp_path)
    np.testing.assert_array_equal(again.predict(X), model.predict(X))


class Net(dt.Model):
    def __init__(self):
        super().__init__()
        self.first, self.last = dt.layers.Dense(4, activation="tanh"), dt.layers.Dense(3, activation="softmax")

    def call(self, x):
        return self.last(self.first(x))


def test_a_model_written_in_python_is_loaded_in_python(tmp_path):
    models = []
    for _ in range(2):
        model = Net()
        model.compile("adam", "sparse_categorical_crossentropy")
        model.predict(X)
        models.append(model)
    model, again = models
    model.fit(X, Y, verbose=0)
    model.save(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"holds a Net, a model written in Python: make one and call its load\(\)"
    ):
        dt.load_model(tmp_path)
    again.load(tmp_path)
    assert again.optimizer.iterations == model.optimizer.iterations
    for each in models:
        each.fit(X, Y, verbose=0)
    assert dt.state_digest(again) == dt.state_digest(model)


def test_another_model_is_refused_and_left_as_it_was(tmp_path):
    worlds.dense_net().save(tmp_path)
    other = dt.Sequential([dt.layers.Dense(6, input_shape=(4,)), dt.layers.Dropout(0.0), dt.layers.Dense(3)])
    before = worlds.weights(other)
    with pytest.raises(
        CheckpointError, match=r"'dense/kernel' is float32 \(4, 5\) in the checkpoint, float32 \(4, 6\)"
    ):
        other.load(tmp_path)
    with pytest.raises(CheckpointError, match="'dense_1/bias' does not match: the model has no such weight"):
        dt.Sequential([dt.layers.Dense(5, input_shape=(4,))]).load(tmp_path)
    worlds.assert_equal(worlds.weights(other), before)


def test_another_optimizer_is_refused_and_the_weights_left_as_they_were(tmp_path):
    model = worlds.dense_net("adam")
    model.fit(X, Y, verbose=0)
    model.save(tmp_path)
    other = worlds.dense_net("sgd")
    before = worlds.weights(other)
    with pytest.raises(CheckpointError, match="optimizer: 'dense/bias/momentum' does not match"):
        other.load(tmp_path)
    worlds.assert_equal(worlds.weights(other), before)


def test_a_checkpoint_that_is_no_model_s_is_named(tmp_path):
    dt.checkpoint.save(tmp_path, {"arrays": {"x": np.ones(2)}}, {"mine": 1})
    with pytest.raises(CheckpointError, match="does not hold a model"):
        dt.load_model(tmp_path)
    with pytest.raises(CheckpointError, match="'dense/bias' does not match: it is not in the checkpoint"):
        worlds.dense_net().load(tmp_path)


@pytest.mark.parametrize("change", [{"units": 3.5}, {"unit": 3}, {"units": None}, {"activation": "relo"}])
def test_arguments_that_a_class_does_not_take_are_named(tmp_path, change):
    described = dt.Sequential([dt.layers.Dense(2, input_shape=(4,))]).description()
    described["config"]["layers"][0]["config"].update(change)
    dt.checkpoint.save(tmp_path, {"model": {}}, {"model": described})
    with pytest.raises(CheckpointError, match=r"a (Dense|Sequential) cannot be made of the arguments"):
        dt.load_model(tmp_path)


@pytest.mark.parametrize(
    "change",
    [lambda v: [1], lambda v: v.update(model={"class": "Sequential"}), lambda v: v["model"].update(config=5),
     lambda v: v["model"].update(compiled={"optimizer": 1, "loss": [], "metrics": None}), lambda v: v.update(model=[])],
)  # fmt: skip
def test_values_that_are_none_of_ours_are_a_checkpoint_error(tmp_path, change):
    model = worlds.dense_net()
    model.save(tmp_path)
    forged(tmp_path, change)
    with pytest.raises(CheckpointError):
        dt.load_model(tmp_path)


@pytest.mark.parametrize(
    "change",
    [lambda v: v.update(training=5), lambda v: v["training"].pop("states"), lambda v: v["training"].update(states=7),
     lambda v: v["training"].update(learning_rate=None), lambda v: v["training"].update(shapes=5),
     lambda v: v["training"].pop("seed"), lambda v: v.pop("versions")],
)  # fmt: skip
def test_so_is_a_state_that_is_none(tmp_path, change):
    x, y = worlds.blobs()
    backup = dt.callbacks.BackupAndRestore(tmp_path)
    worlds.dense_net().fit(x, y, verbose=0, callbacks=[backup])
    forged(tmp_path, change)
    with pytest.raises(CheckpointError):
        worlds.dense_net().fit(x, y, epochs=2, verbose=0, callbacks=[dt.callbacks.BackupAndRestore(tmp_path)])


def forged(path, change):
    shelf.forge(path / "checkpoint-000001", lambda body: body.update(values=change(body["values"]) or body["values"]))
