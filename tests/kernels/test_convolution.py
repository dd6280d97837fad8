"""Convolution's kernels are their definitions: within what summation in any order may differ, and no byte beyond."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from disttrain import ops
from disttrain.kernels import convolution
from tests.kernels.convolving import UNIT, arguments, numbers
from tests.kernels.shapes import CONVOLUTIONS, NONE, ONE

EVERY_SHAPE = pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)


@pytest.fixture(autouse=True)
def _direct(monkeypatch):
    """Compute without Winograd's products, which have tests of their own."""
    monkeypatch.setattr(convolution, "winograd_pays", lambda geometry: False)


class Subclass(np.ndarray):
    """What else it computes is its own affair."""


@EVERY_SHAPE
def test_is_the_definition_in_float64_but_for_rounding(shape, instruction_set, guarded):
    for name, arrays, attributes, terms in arguments(shape):
        got = getattr(convolution, name)(*map(guarded.copy, arrays), **attributes).run()
        definition = getattr(ops, name).definition
        exact = definition(*[a.astype(float) for a in arrays], **attributes)
        sizes = definition(*[np.abs(a).astype(float) for a in arrays], **attributes)
        assert got.shape == exact.shape
        # Higham, "Accuracy and stability of numerical algorithms", (3.5): a sum of n products in any order
        gamma = (terms + 1) * UNIT / (1 - (terms + 1) * UNIT)
        assert (np.abs(got - exact) <= gamma * sizes).all(), name


@pytest.mark.parametrize("padding", [NONE, ONE], ids=["none", "one"])
def test_relu_leaves_nan(padding, instruction_set):
    x, kernel = numbers(2, 6, 5, 5), numbers(3, 3, 5, 6)
    x[1, 2, 3, 1] = np.nan
    got = convolution.conv2d(x, kernel, padding=padding, activation="relu").run()
    expected = ops.conv2d.definition(x, kernel, padding=padding, activation="relu")
    assert np.isnan(got).any()
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("padding", [NONE, ONE], ids=["none", "one"])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2)], ids=str)
def test_nan_and_infinity_reach_what_they_reach_in_the_definition(value, padding, strides, instruction_set):
    window = {"strides": strides, "padding": padding}
    x, kernel = numbers(2, 6, 5, 5), numbers(3, 3, 5, 6)
    g = numbers(*ops.conv2d(x, kernel, **window).shape)
    x[1, 2, 3, 1] = g[0, 1, 1, 4] = value
    for name, arrays, attributes in [
        ("conv2d", (x, kernel), window),
        ("conv2d_input", (g, kernel), {"size": (6, 5), **window}),
        ("conv2d_kernel", (x, g), {"size": (3, 3), **window}),
    ]:
        got = getattr(convolution, name)(*arrays, **attributes).run()
        with np.errstate(invalid="ignore"):
            expected = getattr(ops, name).definition(*arrays, **attributes)
        assert not np.isfinite(got).all()
        np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
        np.testing.assert_array_equal(got[np.isinf(expected)], expected[np.isinf(expected)])


def test_nan_in_the_kernel_reaches_at_least_what_it_reaches_in_the_definition(instruction_set):
    g, kernel = numbers(1, 4, 4, 5), numbers(3, 3, 4, 5)
    kernel[0, 2, 1, 3] = np.nan
    # at borders the kernel multiplies by zeros what the definition leaves out
    got = convolution.conv2d_input(g, kernel, size=(6, 6), padding=NONE).run()
    expected = ops.conv2d_input.definition(g, kernel, size=(6, 6), padding=NONE)
    assert np.isnan(got[np.isnan(expected)]).all()
    assert np.isfinite(got[..., [0, 2, 3]]).all()


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.astype(float),
        lambda x: x.astype(np.float16),
        lambda x: x.astype(">f4"),
        lambda x: np.asfortranarray(x),
        lambda x: np.repeat(x, 2, axis=2)[:, :, ::2],
        lambda x: x.view(Subclass),
        lambda x: np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape),
    ],
    ids=["float64", "float16", "swapped", "fortran", "strided", "subclass", "unaligned"],
)
def test_the_definition_computes_what_kernels_cannot_read(change, instruction_set):
    for name, arrays, attributes, _ in arguments(CONVOLUTIONS[3]):
        arrays = [change(a) for a in arrays]
        assert getattr(convolution, name)(*arrays, **attributes) is None
        op = getattr(ops, name)
        expected = op.definition(*arrays, **attributes)
        got = op(*arrays, **attributes)
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)


def test_lists_serve_as_attributes_as_in_the_definition(instruction_set):
    x, kernel = numbers(2, 6, 5, 5), numbers(3, 3, 5, 6)
    got = ops.conv2d(x, kernel, strides=[2, 1], padding=[[1, 1], [0, 1]])
    np.testing.assert_array_equal(got, ops.conv2d(x, kernel, strides=(2, 1), padding=((1, 1), (0, 1))))


def test_the_op_computes_by_the_kernel(instruction_set, monkeypatch):
    x, kernel = numbers(2, 6, 5, 5), numbers(3, 3, 5, 6)
    monkeypatch.setattr(convolution, "new_array", lambda shape, out: pytest.fail("asked"))
    with pytest.raises(pytest.fail.Exception, match="asked"):
        ops.conv2d(x, kernel, padding=NONE)


def test_threads_that_compute_at_once_do_not_disturb_each_other(instruction_set):
    cases = [arguments(shape)[0] for shape in CONVOLUTIONS[5:9]] * 5
    expected = [convolution.conv2d(*arrays, **attributes).run() for _, arrays, attributes, _ in cases]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda case: convolution.conv2d(*case[1], **case[2]).run(), cases))
    for mine, alone in zip(got, expected, strict=True):
        np.testing.assert_array_equal(mine, alone)
