"""`save`, `load` and `load_model`: a model comes back as it was, and trains on as if nothing had happened."""

import numpy as np
import pytest

import disttrain as dt
from disttrain.comm import threads
from disttrain.errors import CheckpointError
from tests.training import worlds

pytestmark = pytest.mark.timeout(30)

X, Y = worlds.blobs(20)


def configs(model):
    return [layer.get_config() for layer in model.layers]


OPTIMIZERS = {
    "adam": lambda: dt.optimizers.Adam(0.01, beta_1=0.8),
    "adamw": lambda: dt.optimizers.AdamW(0.01),
    "momentum": lambda: dt.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
    "sgd": lambda: dt.optimizers.SGD(0.05),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loaded_model_trains_on_with_the_same_bits(tmp_path, optimizer, world_size):
    x, y = worlds.digits(20)

    def train(comm):
        model = worlds.conv_net(OPTIMIZERS[optimizer](), ["accuracy", "f1_score"])
        model.fit(x, y, batch_size=8, epochs=2, verbose=0)
        model.save(tmp_path)
        loaded = dt.load_model(tmp_path)
        results = []
        for each in (model, loaded):
            before = dt.state_digest(each), each.predict(x).tobytes(), each.optimizer.iterations
            history = each.fit(x, y, batch_size=8, epochs=4, initial_epoch=2, verbose=0).history
            results.append((before, dt.state_digest(each), history["loss"], each.evaluate(x, y)[1], configs(each)))
        return results, loaded.optimizer.get_config() == model.optimizer.get_config(), type(loaded.optimizer)

    for (kept, loaded), equal, kind in threads.run(world_size, train):
        assert loaded == kept
        assert equal
        assert kind is type(OPTIMIZERS[optimizer]())


def test_every_layer_comes_back_with_its_arguments(tmp_path):
    layers = dt.layers
    model = dt.Sequential(
        [
            layers.Conv2D(2, (3, 2), strides=(1, 2), padding="same", use_bias=False, name="eye", input_shape=(8, 8, 1)),
            layers.AveragePooling2D(2, padding="same"),
            layers.BatchNormalization(0.5, 0.01, scale=False, synchronized=False, trainable=False),
            layers.Activation("relu"),
            layers.MaxPooling2D((2, 1), strides=1),
            dt.Sequential([layers.Conv2D(3, 1), layers.Dropout(0.25)], name="inner"),
            layers.GlobalAveragePooling2D(),
            layers.Flatten(),
            layers.Dense(4, kernel_initializer="he_normal", bias_initializer="ones", dtype="float64"),
        ]
    )
    model.save(tmp_path)
    loaded = dt.load_model(tmp_path)
    assert configs(loaded) == configs(model)
    assert [type(layer) for layer in loaded.layers] == [type(layer) for layer in model.layers]
    assert [(w.name, w.shape, w.dtype) for w in loaded.weights] == [(w.name, w.shape, w.dtype) for w in model.weights]
    assert [w.name for w in loaded.trainable_weights] == [w.name for w in model.trainable_weights]
    x = worlds.digits(5)[0]
    np.testing.assert_array_equal(loaded.predict(x), model.predict(x))


def test_a_model_built_by_its_first_call_comes_back_built(tmp_path):
    model = dt.Sequential([dt.layers.Dense(5, activation="tanh"), dt.layers.Dense(3)])
    model(X)
    model.save(tmp_path)
    loaded = dt.load_model(tmp_path)
    assert dt.state_digest(loaded) == dt.state_digest(model)
    np.testing.assert_array_equal(loaded.predict(X), model.predict(X))


def test_a_compiled_model_that_was_never_fitted_comes_back_compiled(tmp_path):
    model = worlds.dense_net("adam", ["accuracy"])
    model.save(tmp_path)
    loaded = dt.load_model(tmp_path)
    assert loaded.evaluate(X, Y) == model.evaluate(X, Y)
    assert loaded.optimizer.iterations == 0


def test_rank_0_may_save_and_predict_alone_between_two_trainings(tmp_path):
    x, y = worlds.digits(20)

    def train(comm):
        model = worlds.conv_net()
        model.fit(x, y, verbose=0)
        if comm.rank == 0:
            with dt.comm.use(dt.comm.connect("local")):
                model.save(tmp_path)
                saved = dt.load_model(tmp_path).predict(x)
                np.testing.assert_array_equal(model.predict(x), saved)
        model.fit(x, y, verbose=0)
        return dt.state_digest(model)

    assert len(set(threads.run(3, train))) == 1


def test_the_newest_checkpoint_counts_and_each_can_be_named(tmp_path):
    model = worlds.dense_net()
    digests = []
    for _ in range(3):
        model.fit(X, Y, verbose=0)
        model.save(tmp_path)
        digests.append(dt.state_digest(model))
    assert dt.state_digest(dt.load_model(tmp_path)) == digests[2]
    assert dt.state_digest(dt.load_model(tmp_path / "checkpoint-000002")) == digests[1]


def test_a_model_in_an_object_store_comes_back():
    model = worlds.dense_net("adam")
    model.fit(X, Y, verbose=0)
    model.save("memory://models/blobs")
    assert dt.state_digest(dt.load_model("memory://models/blobs")) == dt.state_digest(model)


class Scale(dt.Layer):
    def __init__(self, factor, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor

    def build(self, input_shape):
        self.shift = self.add_weight("shift", input_shape[-1:], "ones")

    def call(self, x):
        return x * self.factor + self.shift


class Halving(dt.optimizers.SGD):
    def update(self, parameter, gradient, slots, *, learning_rate, step):
        parameter -= gradient * learning_rate / 2**step


class Hinge(dt.losses.MeanSquaredError):
    name = "hinge"


class Biggest(dt.metrics.MeanAbsoluteError):
    name = "biggest"


def test_classes_of_one_s_own_come_back_when_they_are_given(tmp_path):
    model = dt.Sequential([Scale(2.0, input_shape=(4,)), dt.layers.Dense(1)])
    model.compile(Halving(0.1), Hinge(), [Biggest()])
    y = X[:, :1]
    model.fit(X, y, verbose=0)
    model.save(tmp_path)
    known = {"Scale": Scale, "Halving": Halving, "Hinge": Hinge, "Biggest": Biggest}
    loaded = dt.load_model(tmp_path, custom_objects=known)
    assert loaded.layers[0].factor == 2.0
    assert loaded.evaluate(X, y, return_dict=True) == model.evaluate(X, y, return_dict=True)
    assert type(loaded.optimizer) is Halving
    for name in known:
        some = {key: value for key, value in known.items() if key != name}
        found = worlds.errors(2, lambda comm, some=some: dt.load_model(tmp_path, some))
        assert [type(error) for error in found] == [CheckpointError] * 2
        assert all(
            f"needs the class {name!r}: load_model(path, custom_objects={{{name!r}: ...}})" in str(e) for e in found
        )
