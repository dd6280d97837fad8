"""Layers that hold layers: paths, names, initial weights, configurations, freezing."""

import numpy as np
import pytest

from disttrain import Layer, backend, layers
from disttrain.errors import ConfigError

X = np.random.default_rng(0).standard_normal((4, 3)).astype("float32")


class Block(Layer):
    """Two Dense as attributes, two in a list, one in a dict, one made by `build`."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = layers.Dense(3)
        self.named = layers.Dense(3, name="special")
        self.rest = [layers.Dense(3), layers.Dense(3)]
        self.heads = {"left": layers.Dense(3)}

    def build(self, input_shape):
        self.scale = self.add_weight("scale", input_shape[-1:], "ones")
        self.late = layers.Dense(3)

    def call(self, x):
        for layer in (self.first, self.named, *self.rest, self.heads["left"], self.late):
            x = layer(x)
        return x * self.scale


class Outer(Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.block = Block()

    def call(self, x):
        return self.block(x)


def built(make):
    layer = make()
    layer(X)
    return layer


def test_weights_are_named_by_the_path_of_layers_that_hold_them():
    outer = built(lambda: Outer(name="outer"))
    parts = [
        "scale",
        *[
            f"{p}/{w}"
            for p in ("first", "special", "rest_0", "rest_1", "heads_left", "late")
            for w in ("kernel", "bias")
        ],
    ]
    assert [w.name for w in outer.weights] == [f"outer/block/{part}" for part in parts]
    assert outer.block.rest[1].path == "outer/block/rest_1"
    assert outer.count_params() == 3 + 6 * (9 + 3)


def test_two_layers_built_the_same_have_equal_weights():
    one, other = built(lambda: Outer(name="outer")), built(lambda: Outer(name="outer"))
    for w, v in zip(one.weights, other.weights, strict=True):
        np.testing.assert_array_equal(w.data, v.data)


def test_two_layers_of_one_model_have_different_weights():
    outer = built(Outer)
    kernels = [w.data for w in outer.weights if w.name.endswith("kernel")]
    assert len({kernel.tobytes() for kernel in kernels}) == len(kernels) == 6


def test_initial_weights_follow_the_seed():
    before = built(lambda: layers.Dense(3, name="d")).kernel.data
    backend.set_random_seed(1)
    after = built(lambda: layers.Dense(3, name="d")).kernel.data
    assert not np.equal(before, after).any()


def test_initial_weights_do_not_depend_on_layers_made_before():
    alone = built(lambda: layers.Dense(3, name="d")).kernel.data
    built(Outer)
    np.testing.assert_array_equal(built(lambda: layers.Dense(3, name="d")).kernel.data, alone)


def test_initial_weights_lie_in_memory_as_optimizers_need_them():
    dense = built(lambda: layers.Dense(2, kernel_initializer=lambda g, shape: g.normal(size=shape[::-1]).T))
    assert dense.kernel.data.flags.c_contiguous


def test_a_shared_layer_has_its_weights_once():
    class Twice(Layer):
        def __init__(self, shared, **kwargs):
            super().__init__(**kwargs)
            self.one = shared
            self.both = [shared, layers.Dense(3)]

        def call(self, x):
            return self.both[1](self.one(self.both[0](x)))

    twice = Twice(layers.Dense(3), name="twice")
    y = twice(X)
    assert len(twice.weights) == 4
    assert len({w.name for w in twice.weights}) == 4
    y.sum().backward()
    ones = np.ones((1, 3))
    back = ones @ twice.both[1].kernel.data.T  # through the layer on top
    both = (back * 4)[0] + (4 * back @ twice.one.kernel.data.T)[0]  # a bias of each use, for four samples
    np.testing.assert_allclose(twice.one.bias.grad, both, rtol=0, atol=100 * 2**-24)


def test_two_layers_of_one_name_are_an_error():
    class Both(Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.a, self.b = layers.Dense(1, name="same"), layers.Dense(1, name="same")

    with pytest.raises(ConfigError, match="'both' are called 'same'"):
        Both(name="both")(X)


def test_a_layer_of_no_model_is_named_after_its_class():
    class MyHTTPLayer2D(Layer):
        def call(self, x):
            return x

    first, second = MyHTTPLayer2D(), MyHTTPLayer2D()
    assert (first.path, second.path) == ("my_http_layer2d", "my_http_layer2d_1")


CONFIGS = [
    layers.Activation("tanh"),
    layers.AveragePooling2D((2, 3), 1, "same"),
    layers.BatchNormalization(0.9, 0.01, center=False, scale=False, synchronized=False),
    layers.Conv2D(
        4, (3, 2), 2, "same", "relu", use_bias=False, kernel_initializer="he_normal", bias_initializer="ones"
    ),
    layers.Dense(5, "relu", use_bias=False, kernel_initializer="he_normal", bias_initializer="ones"),
    layers.Dropout(0.25),
    layers.Flatten(),
    layers.GlobalAveragePooling2D(),
    layers.LayerNormalization(epsilon=0.01, center=False, scale=False),
    layers.MaxPooling2D(3, (1, 2), "same"),
]
ELSEWHERE = {
    layers.Bidirectional,
    layers.Embedding,
    layers.GRU,
    layers.LSTM,
    layers.Masking,
    layers.MultiHeadAttention,
    layers.SimpleRNN,
}  # whose inputs are of another kind: own tests


@pytest.mark.parametrize("layer", CONFIGS, ids=lambda layer: type(layer).__name__)
def test_a_configuration_makes_the_layer_again(layer):
    cls = type(layer)
    layer.name, layer.trainable, layer.input_shape, layer.dtype = "n", False, (8, 8, 2), "float64"
    config = layer.get_config()
    again = cls(**config)
    assert again.get_config() == config
    assert config.keys() >= {"name", "dtype", "trainable", "input_shape"}
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 2))
    np.testing.assert_array_equal(again(x).data, layer(x).data)
    default = cls(*[0.5] * (cls is layers.Dropout), **({"units": 1} if cls is layers.Dense else {}),
                  **({"activation": "relu"} if cls is layers.Activation else {}),
                  **({"filters": 1, "kernel_size": 1} if cls is layers.Conv2D else {}))  # fmt: skip
    own = config.keys() - {"name", "dtype", "trainable", "input_shape", "axis"}  # of which -1 is the only one
    # every argument that has another value than its default comes back with it
    assert all(config[key] != default.get_config()[key] for key in own)


def test_every_layer_has_a_configuration_here():
    classes = {getattr(layers, n) for n in layers.__all__ if isinstance(getattr(layers, n), type)}
    assert {type(layer) for layer in CONFIGS} == classes - {Layer, layers.Step} - ELSEWHERE


def test_the_configuration_of_a_users_layer_holds_its_own_arguments():
    class Mine(layers.Dense):
        def __init__(self, units, extra=3, **kwargs):
            super().__init__(units, **kwargs)
            self.extra = extra

    config = Mine(2, extra=7, activation="relu").get_config()
    assert (config["units"], config["extra"], config["activation"]) == (2, 7, "relu")
    assert Mine(**config).get_config() == config


def test_a_frozen_layer_freezes_what_it_holds():
    outer = built(Outer)
    outer.block.first.trainable = False
    assert [w.name.split("/")[-2] for w in outer.non_trainable_weights] == ["first", "first"]
    outer.block.trainable = False
    assert outer.trainable_weights == []
    assert outer.non_trainable_weights == outer.weights


def test_weights_that_are_state_are_never_trained():
    norm = layers.BatchNormalization(name="bn")
    norm(X)
    assert [w.name for w in norm.trainable_weights] == ["bn/gamma", "bn/beta"]
    assert [w.name for w in norm.non_trainable_weights] == ["bn/moving_mean", "bn/moving_variance"]
    assert not norm.moving_mean.requires_grad


def test_the_output_shape_is_known_after_a_call():
    conv = layers.Conv2D(4, 3)
    assert conv.output_shape is None
    conv(np.ones((2, 5, 6, 1)))
    assert conv.output_shape == (None, 3, 4, 4)


def test_floatx_is_the_dtype_of_layers_made_after_it():
    before = layers.Dense(1)
    backend.set_floatx("float64")
    assert (before.dtype, layers.Dense(1).dtype) == ("float32", "float64")
    assert built(lambda: layers.Dense(1)).kernel.dtype == "float64"


def test_a_layer_without_call_says_so():
    class Empty(Layer):
        pass

    with pytest.raises(NotImplementedError, match="Empty must define call"):
        Empty()(X)


def test_whether_a_layer_trains_is_said_by_the_step_or_the_call():
    seen = []

    class Spy(Layer):
        def call(self, x, training=False):
            seen.append(training)
            return x

    class Holder(Layer):
        def __init__(self):
            super().__init__()
            self.spy = Spy()

        def call(self, x):
            return self.spy(x)

    holder = Holder()
    holder(X)
    holder(X, training=True)
    with layers.running(layers.Step(training=True)):
        holder(X)
        holder(X, training=False)
    holder(X)
    assert seen == [False, True, True, False, False]
