"""Models: in sequence or written in Python, nested, shared, frozen; when they get their weights."""

import numpy as np
import pytest

import disttrain as dt
from disttrain.errors import ConfigError, ShapeError
from tests.training import worlds

pytestmark = pytest.mark.timeout(30)

X, Y = worlds.blobs(20)


def names(model):
    return [w.name for w in model.weights]


def test_a_known_input_shape_builds_at_once_else_the_first_call_does():
    at_once = dt.Sequential([dt.layers.Dense(5, input_shape=(4,)), dt.layers.Dense(3)])
    later = dt.Sequential([dt.layers.Dense(5), dt.layers.Dense(3)])
    assert [w.shape for w in at_once.weights] == [(4, 5), (5,), (5, 3), (3,)]
    assert later.weights == []
    np.testing.assert_array_equal(later(X).data, at_once(X).data)  # the same initial weights
    assert names(later) == names(at_once) == ["dense/kernel", "dense/bias", "dense_1/kernel", "dense_1/bias"]


def test_add_appends_and_builds_what_it_can():
    model, whole = dt.Sequential(), dt.Sequential([dt.layers.Dense(5, input_shape=(4,)), dt.layers.Dense(3)])
    model.add(dt.layers.Dense(5, input_shape=(4,)))
    assert len(model.weights) == 2
    model.add(dt.layers.Dense(3))
    assert names(model) == names(whole)
    assert dt.state_digest(model) == dt.state_digest(whole)

    built_by_call = dt.Sequential([dt.layers.Dense(5)])
    built_by_call(X)
    with pytest.raises(ConfigError, match="add all layers before"):
        built_by_call.add(dt.layers.Dense(3))


def test_a_layer_added_after_training_is_trained_or_refused():
    # compiling anew is asked for: the optimizer's state is of the weights that were there
    model = worlds.dense_net()
    model.fit(X, Y, verbose=0)
    model.add(dt.layers.Dense(3, activation="softmax"))
    with pytest.raises(ConfigError, match="make another for this one"):
        model.fit(X, Y, verbose=0)
    model.compile("sgd", "sparse_categorical_crossentropy")
    before = worlds.weights(model)
    model.fit(X, Y, verbose=0)
    assert all((worlds.weights(model)[name] != before[name]).any() for name in before)


class Scale(dt.Layer):
    """The layer of the documentation."""

    def build(self, input_shape):
        self.factor = self.add_weight("factor", input_shape[-1:], "ones")

    def call(self, x):
        return x * self.factor


class Block(dt.Layer):
    """A layer of layers, one of which it uses twice."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.first = dt.layers.Dense(units, activation="tanh")
        self.twice = dt.layers.Dense(units, activation="tanh", use_bias=False)
        self.scale = Scale()

    def call(self, x):
        return self.scale(self.twice(self.twice(self.first(x))))


class Net(dt.Model):
    def __init__(self):
        super().__init__()
        self.blocks = [Block(6), Block(5)]
        self.heads = {"main": dt.layers.Dense(3, activation="softmax")}
        self.drop = dt.layers.Dropout(0.5)

    def call(self, x, training=False):
        for block in self.blocks:
            x = block(x)
        if training:
            x = self.drop(x)
        return self.heads["main"](x)


def test_a_model_of_one_s_own_names_its_weights_by_their_places():
    model = Net()
    assert model.predict(X).shape == (20, 3)
    block = ["first/kernel", "first/bias", "twice/kernel", "scale/factor"]
    assert names(model) == [
        *(f"blocks_0/{name}" for name in block), *(f"blocks_1/{name}" for name in block),
        "heads_main/kernel", "heads_main/bias",
    ]  # fmt: skip
    assert model.count_params() == (24 + 6 + 36 + 6) + (30 + 5 + 25 + 5) + (15 + 3)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_model_of_one_s_own_trains_as_on_one_worker(float64, world_size):
    def fit(comm):
        model = Net()
        model.compile("adam", "sparse_categorical_crossentropy", ["accuracy"])
        model.fit(X, Y, batch_size=7, epochs=3, verbose=0)
        return worlds.weights(model), model.evaluate(X, Y)[0]

    ours, loss = worlds.alone(fit)
    for others, same_loss in dt.comm.threads.run(world_size, fit):
        worlds.assert_close(others, ours, 1e-10)  # as in test_any_number_of_workers
        assert same_loss == pytest.approx(loss, rel=1e-10)


def test_the_gradient_of_a_shared_layer_is_the_sum_of_its_uses(float64):
    shared = dt.layers.Dense(4, use_bias=False, input_shape=(4,))
    model = dt.Sequential([shared, shared])
    assert len(model.weights) == 1
    model.compile(dt.optimizers.SGD(0.1), "mse")
    w = model.weights[0].data.copy()
    model.train_on_batch(X, X)
    hidden = X @ w
    slope = 2 * (hidden @ w - X) / X.size
    np.testing.assert_allclose(
        model.weights[0].data, w - 0.1 * (hidden.T @ slope + X.T @ (slope @ w.T)), rtol=1e-12
    )  # fmt: skip


def test_frozen_layers_keep_their_weights_and_others_do_not():
    x, y = worlds.digits(20)
    model = worlds.conv_net()
    frozen = [model.layers[0], model.layers[1]]
    for layer in frozen:
        layer.trainable = False
    model.compile("adam", "sparse_categorical_crossentropy")
    assert [w.name for w in model.trainable_weights][:1] == ["conv2d_1/kernel"]
    before = worlds.weights(model)
    model.fit(x, y, epochs=2, verbose=0)
    kept = {w.name for layer in frozen for w in layer.weights}
    assert [w.grad for layer in frozen for w in layer.weights] == [None] * 6  # not computed either
    assert len(kept) == 6
    for name, weight in worlds.weights(model).items():
        assert (weight == before[name]).all() == (name in kept), name
    frozen[0].trainable = True
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(x, y, verbose=0)
    assert (frozen[0].kernel.data != before["conv2d/kernel"]).any()
    assert (frozen[1].gamma.data == before["batch_normalization/gamma"]).all()


def test_a_frozen_model_freezes_what_it_holds_and_can_be_fitted_all_the_same():
    model = worlds.dense_net()
    model.trainable = False
    digest = dt.state_digest(model)
    history = model.fit(X, Y, epochs=2, verbose=0).history
    assert model.trainable_weights == []
    assert dt.state_digest(model) == digest
    assert history["loss"][0] == pytest.approx(model.evaluate(X, Y), rel=1e-6)  # float32


def test_a_wrong_shape_inside_names_the_layer_by_its_path():
    class Wrong(Net):
        def call(self, x):
            return self.heads["main"](self.blocks[0](x)[:, :3])

    model = Wrong()
    model.predict(X)
    with pytest.raises(
        ShapeError, match=r"layer 'heads_main' \(Dense\): expected .*\(samples, ..., 3\), received \(20, 2\)"
    ):
        model.heads["main"](X[:, :2])


def test_two_layers_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="are called 'a'; names must differ"):
        dt.Sequential([dt.layers.Dense(2, name="a", input_shape=(2,)), dt.layers.Dense(2, name="a")])


def test_summary_lists_layers_shapes_and_numbers(capsys):
    model = worlds.conv_net()
    model.layers[0].trainable = False
    model.summary()
    out = capsys.readouterr().out
    rows = {
        "conv2d (Conv2D)": ("(samples, 8, 8, 4)", "40"),
        "batch_normalization (BatchNormalization)": ("(samples, 8, 8, 4)", "16"),
        "max_pooling2d (MaxPooling2D)": ("(samples, 4, 4, 4)", "0"),
        "conv2d_1 (Conv2D)": ("(samples, 2, 2, 6)", "222"),
        "flatten (Flatten)": ("(samples, 24)", "0"),
        "dense (Dense)": ("(samples, 10)", "250"),
    }
    for layer, (shape, count) in rows.items():
        (line,) = [line for line in out.splitlines() if f" {layer} " in line]
        assert f" {shape} " in line
        assert line.rstrip(" │").endswith(f" {count}")
    assert "Parameters: 552, of which trained: 492." in out  # without 40 of conv2d and 4 moving averages of 20 numbers
    dt.Sequential([dt.layers.Dense(2)]).summary()
    assert "not built" in capsys.readouterr().out
