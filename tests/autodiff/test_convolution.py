"""Convolution and pooling, over many windows, against loops over single numbers."""

import itertools

import numpy as np
import pytest

from disttrain import Tensor, check_grads, grad, ops
from disttrain.autodiff.ops import conv
from disttrain.errors import ConfigError, ShapeError
from tests.autodiff import naive

SIZES = [(1, 1), (2, 2), (3, 3), (1, 4), (5, 2)]
STRIDES = [(1, 1), (2, 2), (3, 1)]
PADDINGS = [naive.VALID, ((1, 1), (2, 2)), ((0, 2), (1, 0))]
CHANNELS = [(1, 1), (3, 2)]

# a sum of at most 5 * 2 * 3 products of numbers below 5, each rounded once, and each partial sum too
TOLERANCE = 2 * 30 * 25 * 2**-53


def images(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape)


@pytest.mark.parametrize("channels", CHANNELS, ids=str)
@pytest.mark.parametrize("padding", PADDINGS, ids=str)
@pytest.mark.parametrize("strides", STRIDES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_convolution_is_the_seven_loops(size, strides, padding, channels):
    x, kernel = images(2, 6, 5, channels[0]), images(*size, *channels)
    got = ops.conv2d(x, kernel, strides=strides, padding=padding)
    np.testing.assert_allclose(got, naive.conv2d(x, kernel, strides, padding), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("padding", PADDINGS, ids=str)
@pytest.mark.parametrize("strides", STRIDES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_three_convolutions_are_adjoint(size, strides, padding):
    x, kernel = images(3, 7, 8, 2), images(*size, 2, 3)
    window = {"strides": strides, "padding": padding}
    y = ops.conv2d(x, kernel, **window)
    g = images(*y.shape)
    forward = (y * g).sum()
    # <conv(x, k), g> = <x, conv_input(g, k)> = <k, conv_kernel(x, g)>: the same products, added otherwise
    products = ops.conv2d(np.abs(x), np.abs(kernel), **window)
    tolerance = 2 * y.size * 2**-53 * (products * np.abs(g)).sum()
    assert (x * ops.conv2d_input(g, kernel, size=(7, 8), **window)).sum() == pytest.approx(
        forward, rel=0, abs=tolerance
    )
    assert (kernel * ops.conv2d_kernel(x, g, size=size, **window)).sum() == pytest.approx(forward, rel=0, abs=tolerance)


def test_a_bias_of_another_shape_or_an_activation_it_does_not_know_is_an_error():
    x, kernel = images(2, 6, 5, 3), images(3, 3, 3, 4)
    with pytest.raises(ShapeError, match=r"a bias of shape \(1,\) for 4 filters; expected \(4,\)"):
        ops.conv2d(x, kernel, images(1), padding=naive.VALID)
    with pytest.raises(ConfigError, match="activation of conv2d 'tanh'"):
        ops.conv2d(x, kernel, padding=naive.VALID, activation="tanh")


def test_a_bias_without_need_of_a_gradient_gets_none():
    x, kernel = Tensor(images(2, 4, 4, 3), requires_grad=True), images(3, 3, 3, 4)
    ops.conv2d(x, kernel, images(4), padding=naive.VALID, activation="relu").sum().backward()
    assert x.grad.shape == x.shape


def test_operations_are_counted_as_the_definition_makes_them():
    shapes = {"x": (2, 6, 5, 3), "y": (2, 4, 3, 4), "k": (3, 3, 3, 4)}
    x, y, k = (images(*shape) for shape in shapes.values())
    expected = 2 * (2 * 4 * 3) * (3 * 3 * 3 * 4)
    assert ops.conv2d.flops(y, x, k, padding=naive.VALID) == expected
    assert ops.conv2d_input.flops(x, y, k, size=(6, 5), padding=naive.VALID) == expected
    assert ops.conv2d_kernel.flops(k, x, y, size=(3, 3), padding=naive.VALID) == expected


@pytest.mark.parametrize(("length", "window", "stride"), [*itertools.product(range(1, 9), range(1, 6), range(1, 5))])
def test_same_padding_lets_a_window_start_at_every_stride(length, window, stride):
    rows, columns = conv.same_padding((length, 9), (window, 1), (stride, 1))
    expected = -(-length // stride)  # ceil
    assert columns == (0, 0)
    assert conv.output_size((length, 9), (window, 1), (stride, 1), (rows, columns)) == (expected, 9)
    total = sum(rows)
    assert rows[1] - rows[0] in (0, 1)  # the odd one at the end
    # no more than needed: with one less a window would miss, unless none was needed
    assert total == 0 or len(range(0, length + total - 1 - window + 1, stride)) < expected


def test_images_that_do_not_fit_into_the_cache_together_are_convolved_as_each_alone(monkeypatch):
    x, kernel = images(7, 6, 5, 2), images(3, 2, 2, 3)
    window = {"strides": (1, 2), "padding": ((1, 1), (0, 1))}
    g = images(*ops.conv2d(x, kernel, **window).shape)
    one = 6 * 3 * (3 * 2 * 2) * 8  # bytes of an image's patches
    monkeypatch.setattr(conv, "_CACHE_BYTES", 3 * one + 1)  # blocks of three, three and one
    assert conv._images_at_a_time(np, 7, one) == 3
    y = ops.conv2d(x, kernel, **window)
    back = ops.conv2d_input(g, kernel, size=(6, 5), **window)
    kernels = ops.conv2d_kernel(x, g, size=(3, 2), **window)
    alone = [slice(i, i + 1) for i in range(7)]
    np.testing.assert_allclose(y, naive.conv2d(x, kernel, **window), rtol=0, atol=TOLERANCE)
    expected = [ops.conv2d_input(g[i], kernel, size=(6, 5), **window) for i in alone]
    np.testing.assert_allclose(back, np.concatenate(expected), rtol=0, atol=TOLERANCE)
    total = sum(ops.conv2d_kernel(x[i], g[i], size=(3, 2), **window) for i in alone)
    # each a sum of 7 * 18 products
    np.testing.assert_allclose(kernels, total, rtol=0, atol=2 * 7 * 18 * 25 * 2**-53)


def test_a_batch_of_many_cache_blocks_is_convolved_as_its_images():
    x, kernel = images(9, 24, 24, 8).astype("float32"), images(3, 3, 8, 4).astype("float32")
    assert conv._images_at_a_time(np, 9, 22 * 22 * 72 * 4) < 9
    got = ops.conv2d(x, kernel, padding=naive.VALID)
    expected = np.concatenate([ops.conv2d(x[i : i + 1], kernel, padding=naive.VALID) for i in range(9)])
    np.testing.assert_allclose(got, expected, rtol=0, atol=2 * 72 * 25 * 2**-24)


@pytest.mark.parametrize("padding", [naive.VALID, ((1, 0), (1, 1))], ids=str)
@pytest.mark.parametrize("strides", STRIDES, ids=str)
@pytest.mark.parametrize("size", [(2, 2), (3, 2), (2, 3)], ids=str)
def test_pooling_is_the_loop_over_windows_without_padding(size, strides, padding):
    x = images(2, 6, 5, 3) - 10  # so that a padding of 0 would win, and would lift the mean
    window = {"size": size, "strides": strides, "padding": padding}
    np.testing.assert_array_equal(ops.max_pool2d(x, **window), naive.pool2d(x, **window, reduce=max))
    average = naive.pool2d(x, **window, reduce=lambda values: sum(values) / len(values))
    np.testing.assert_allclose(ops.average_pool2d(x, **window), average, rtol=12 * 2**-53)


def test_the_first_of_equal_maxima_gets_the_gradient():
    x = Tensor(np.array([[1, 3, 3], [3, 2, 5], [5, 5, 0]], float).reshape(1, 3, 3, 1), requires_grad=True)
    y = ops.max_pool2d(x, size=(2, 2), strides=(1, 1), padding=naive.VALID)
    y.backward(np.array([1, 10, 100, 1000.0]).reshape(y.shape))
    # windows: 3 at (0, 1); 5 at (1, 2); 5 at (2, 0); 5 at (1, 2), read row by row
    np.testing.assert_array_equal(x.grad.reshape(3, 3), [[0, 1, 0], [0, 0, 1010], [100, 0, 0]])


def test_equal_maxima_in_overlapping_windows_of_zeros_go_to_each_windows_first():
    x = Tensor(np.zeros((1, 4, 4, 1)), requires_grad=True)
    y = ops.max_pool2d(x, size=(3, 3), strides=(2, 2), padding=((1, 0), (1, 0)))
    y.sum().backward()
    expected = np.zeros((4, 4))
    expected[[0, 0, 1, 1], [0, 1, 0, 1]] = 1  # padding is never the first
    np.testing.assert_array_equal(x.grad.reshape(4, 4), expected)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[::-1, :, ::-1],
        lambda x: x.transpose(0, 2, 1, 3),
        lambda x: x[:, 1:, ::2, 1:],
        lambda x: np.broadcast_to(x[:1, :1], x.shape),
        lambda x: x.astype("float32")[..., :2],
    ],
)
def test_images_may_lie_in_memory_as_they_like(view):
    x = view(images(3, 6, 6, 3))
    kernel = images(3, 2, x.shape[-1], 2).astype(x.dtype)
    padding = ((1, 0), (0, 1))
    copy = np.ascontiguousarray(x)
    y = ops.conv2d(x, kernel, padding=padding)
    np.testing.assert_array_equal(y, ops.conv2d(copy, kernel, padding=padding))
    window = {"size": (2, 2), "strides": (1, 2), "padding": padding}
    for pool in (ops.max_pool2d, ops.average_pool2d):
        np.testing.assert_array_equal(pool(x, **window), pool(copy, **window))
    g = np.broadcast_to(np.array(2, x.dtype), y.shape)  # as the gradient of a sum is
    np.testing.assert_array_equal(
        ops.conv2d_kernel(x, g, size=(3, 2), padding=padding),
        ops.conv2d_kernel(copy, np.ascontiguousarray(g), size=(3, 2), padding=padding),
    )
    np.testing.assert_array_equal(
        ops.conv2d_input(g, kernel, size=x.shape[1:3], padding=padding),
        ops.conv2d_input(np.ascontiguousarray(g), kernel, size=x.shape[1:3], padding=padding),
    )


@pytest.mark.parametrize("pool", [ops.max_pool2d, ops.average_pool2d])
def test_functions_of_the_gradient_of_pooling_agree_with_finite_differences(pool):
    x = np.array([[0.5, -1, 1.5], [-0.25, 1, 0.75]]).reshape(1, 2, 3, 1)

    def squared_slopes(x):
        slopes = grad(lambda x: (pool(x, size=(2, 2), strides=(1, 1), padding=((0, 0), (0, 1))) ** 2).sum())(x)
        return slopes * slopes

    check_grads(squared_slopes, x, order=2)
