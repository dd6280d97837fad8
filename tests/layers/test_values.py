"""What Dense, Conv2D, pooling, Flatten and Activation compute, against NumPy and naive loops."""

import math

import numpy as np
import pytest

from disttrain import Tensor, layers
from disttrain.autodiff.ops.conv import same_padding
from disttrain.errors import ConfigError, ShapeError
from tests.autodiff import naive

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.standard_normal((3, 6, 5, 2))


def random_bias(generator, shape):
    return generator.standard_normal(shape)


@pytest.mark.parametrize("shape", [(4, 3), (2, 5, 3), (1, 3)])
def test_dense_is_a_product_a_bias_and_an_activation(shape):
    x = RANDOM.standard_normal(shape)
    dense = layers.Dense(2, "tanh", bias_initializer=random_bias, dtype="float64")
    y = dense(x)
    assert (dense.kernel.shape, dense.bias.shape) == ((3, 2), (2,))
    expected = np.tanh(np.einsum("...i,ij->...j", x, dense.kernel.data) + dense.bias.data)
    np.testing.assert_allclose(y.data, expected, rtol=0, atol=20 * 2**-53)


def test_a_bias_is_optional():
    dense, conv = layers.Dense(2, use_bias=False), layers.Conv2D(2, 1, use_bias=False)
    dense(np.ones((1, 3)))
    conv(IMAGES)
    assert [w.name for w in dense.weights + conv.weights] == [dense.path + "/kernel", conv.path + "/kernel"]


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("strides", [1, (2, 1), (3, 2)])
@pytest.mark.parametrize("size", [1, 3, (2, 3)])
def test_conv2d_is_the_seven_loops_a_bias_and_an_activation(size, strides, padding):
    conv = layers.Conv2D(3, size, strides, padding, "relu", bias_initializer=random_bias, dtype="float64")
    y = conv(IMAGES)
    pads = same_padding((6, 5), conv.kernel_size, conv.strides) if padding == "same" else naive.VALID
    expected = np.maximum(naive.conv2d(IMAGES, conv.kernel.data, conv.strides, pads) + conv.bias.data, 0)
    # 18 products of numbers below 5 and a bias
    np.testing.assert_allclose(y.data, expected, rtol=0, atol=2 * 20 * 25 * 2**-53)
    if padding == "same":
        assert y.shape[1:3] == (-(-6 // conv.strides[0]), -(-5 // conv.strides[1]))


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize(("size", "strides"), [(2, None), (3, 2), ((2, 3), (1, 2))])
def test_pooling_layers_are_the_loop_over_windows(size, strides, padding):
    for cls, reduce in ((layers.MaxPooling2D, max), (layers.AveragePooling2D, lambda v: sum(v) / len(v))):
        layer = cls(size, strides, padding, dtype="float64")
        assert strides is not None or layer.strides == layer.pool_size
        pads = same_padding((6, 5), layer.pool_size, layer.strides) if padding == "same" else naive.VALID
        expected = naive.pool2d(IMAGES, layer.pool_size, layer.strides, pads, reduce)
        np.testing.assert_allclose(layer(IMAGES).data, expected, rtol=0, atol=12 * 5 * 2**-53)


def test_global_average_pooling_is_the_mean_of_each_channel():
    got = layers.GlobalAveragePooling2D(dtype="float64")(IMAGES)
    expected = [[sum(image[:, :, c].ravel()) / 30 for c in range(2)] for image in IMAGES]
    np.testing.assert_allclose(got.data, expected, rtol=0, atol=2 * 30 * 5 * 2**-53)


def test_flatten_reads_each_sample_row_by_row_and_keeps_the_dtype():
    x = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    y = layers.Flatten()(x)
    assert y.dtype == "uint8"
    np.testing.assert_array_equal(y.data, [range(12), range(12, 24)])
    assert layers.Flatten()(np.zeros((5,))).shape == (5, 1)


def gelu(x):
    return x * np.vectorize(lambda v: math.erfc(-v / math.sqrt(2)))(x) / 2


FORMULAS = {
    "elu": lambda x: np.where(x > 0, x, np.expm1(x)),
    "exponential": np.exp,
    "gelu": gelu,
    "leaky_relu": lambda x: np.where(x > 0, x, 0.2 * x),
    "linear": lambda x: x,
    "log_softmax": lambda x: x - np.logaddexp.reduce(x, -1, keepdims=True),
    "relu": lambda x: x * (x > 0),
    "selu": lambda x: 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * np.expm1(x)),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "softmax": naive.softmax,
    "softplus": lambda x: np.log(1 + np.exp(x)),
    "swish": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_an_activation_is_its_formula_by_name_and_within_dense(name):
    x = RANDOM.standard_normal((4, 3))
    identity = layers.Dense(3, name, kernel_initializer=lambda generator, shape: np.eye(3), dtype="float64")
    for layer in (layers.Activation(name, dtype="float64"), identity):
        np.testing.assert_allclose(layer(x).data, FORMULAS[name](x), rtol=50 * 2**-53, atol=50 * 2**-53)


def test_every_known_activation_has_a_formula_here():
    with pytest.raises(ConfigError, match=f"Known: {', '.join(sorted(FORMULAS))}"):
        layers.get_activation("gelou")


def test_an_activation_may_be_a_function_or_none():
    x = np.array([[1.0, -2]])
    np.testing.assert_array_equal(layers.Activation(lambda t: t * 2)(x).data, x * 2)
    assert layers.get_activation(None)(5) == 5


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("given", ["int64", "uint8", "float16", "float64", "bool"])
def test_inputs_are_cast_to_the_layers_dtype(dtype, given):
    dense = layers.Dense(2, dtype=dtype)
    x = np.ones((3, 4), given)
    y = dense(x)
    assert y.dtype == dense.kernel.dtype == dtype
    np.testing.assert_array_equal(y.data, dense(x.astype(dtype)).data)


def test_the_gradient_of_a_cast_input_has_the_inputs_dtype():
    x = Tensor(np.ones((3, 4)), requires_grad=True)
    layers.Dense(2)(x).sum().backward()
    assert x.grad.dtype == "float64"


def test_lists_of_numbers_are_inputs():
    assert layers.Dense(2)([[1, 2, 3], [4, 5, 6]]).shape == (2, 2)


ALL = {
    "Activation": (lambda: layers.Activation("relu"), (4,)),
    "AveragePooling2D": (layers.AveragePooling2D, (4, 4, 2)),
    "BatchNormalization": (layers.BatchNormalization, (4,)),
    "Bidirectional": (lambda: layers.Bidirectional(layers.GRU(2)), (3, 4)),
    "Conv2D": (lambda: layers.Conv2D(2, 3), (4, 4, 2)),
    "Dense": (lambda: layers.Dense(2), (4,)),
    "Dropout": (lambda: layers.Dropout(0.5), (4,)),
    "Flatten": (layers.Flatten, (4, 4, 2)),
    "GRU": (lambda: layers.GRU(2), (3, 4)),
    "GlobalAveragePooling2D": (layers.GlobalAveragePooling2D, (4, 4, 2)),
    "LSTM": (lambda: layers.LSTM(2), (3, 4)),
    "LayerNormalization": (layers.LayerNormalization, (4,)),
    "Masking": (layers.Masking, (3, 4)),
    "MaxPooling2D": (layers.MaxPooling2D, (4, 4, 2)),
    "SimpleRNN": (lambda: layers.SimpleRNN(2), (3, 4)),
}
ELSEWHERE = {"Embedding", "MultiHeadAttention"}  # indices have no gradient, values are another input: own tests


@pytest.mark.parametrize("name", ALL)
def test_an_empty_batch_gives_an_empty_batch_and_no_gradients(name):
    make, shape = ALL[name]
    layer = make()
    full = layer(np.ones((2, *shape)))
    training = name != "BatchNormalization"  # of which nobody has samples then: see its own tests
    x = Tensor(np.zeros((0, *shape), np.float32), requires_grad=True)
    y = layer(x, training=training)
    assert y.shape == (0, *full.shape[1:])
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert not any(w.grad.any() for w in layer.trainable_weights)


def test_every_layer_takes_an_empty_batch_here():
    classes = {n for n in layers.__all__ if isinstance(getattr(layers, n), type)} - {"Layer", "Step"}
    assert set(ALL) == classes - ELSEWHERE


@pytest.mark.parametrize(
    ("layer", "good", "bad", "expected"),
    [
        (layers.Dense(2, name="d"), (3, 4), (3, 5), r"'d' \(Dense\): .*\(samples, \.\.\., 4\), received \(3, 5\)"),
        (layers.Dense(2, name="d"), None, (3,), r"'d' \(Dense\): .*channels\), received \(3,\)"),
        (layers.Conv2D(2, 3, name="c"), (1, 4, 4, 2), (1, 4, 4, 3), r"'c' .*\(samples, height, width, 2\), received"),
        (layers.Conv2D(2, 3, name="c"), None, (4, 4, 2), r"'c' \(Conv2D\).*received \(4, 4, 2\)"),
        (layers.MaxPooling2D(name="m"), None, (4, 4), r"'m' \(MaxPooling2D\).*received \(4, 4\)"),
        (layers.GlobalAveragePooling2D(name="g"), None, (4, 4), r"'g' .*received \(4, 4\)"),
        (layers.Conv2D(2, 3, name="c"), None, (1, 2, 5, 1), r"'c' .*does not fit into an image of 2 x 5.*same"),
        (layers.AveragePooling2D(3, name="a"), None, (1, 5, 2, 1), r"'a' .*does not fit into an image of 5 x 2"),
    ],
)  # fmt: skip
def test_a_wrong_shape_is_an_error_with_layer_expectation_and_shape(layer, good, bad, expected):
    if good is not None:
        layer(np.ones(good))
    with pytest.raises(ShapeError, match=expected):
        layer(np.ones(bad))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: layers.Dense(0), "units must be at least 1, not 0"),
        (lambda: layers.Conv2D(0, 1), "filters must be at least 1, not 0"),
        (lambda: layers.Conv2D(1, 3.0), r"kernel_size is .*not 3\.0"),
        (lambda: layers.Conv2D(1, (3, 3, 3)), "kernel_size"),
        (lambda: layers.Conv2D(1, 3, 0), "strides is .*not 0"),
        (lambda: layers.Conv2D(1, 3, padding="sam"), "unknown padding 'sam'; did you mean 'same'"),
        (lambda: layers.MaxPooling2D(0), "MaxPooling2D: pool_size"),
        (lambda: layers.MaxPooling2D(padding="full"), "unknown padding"),
        (lambda: layers.Dense(1, "rellu"), "did you mean 'relu'"),
        (lambda: layers.Activation(3), "an activation is"),
        (lambda: layers.Dropout(1.0), r"below 1, not 1\.0"),
        (lambda: layers.Dropout(-0.1), "rate"),
    ],
)
def test_a_wrong_argument_is_an_error_of_the_constructor(make, expected):
    with pytest.raises(ConfigError, match=expected):
        make()


def test_window_sizes_may_be_numpys_numbers():
    assert layers.Conv2D(2, np.int64(3)).kernel_size == (3, 3)
