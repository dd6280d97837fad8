"""Activations by kernels are their definitions in float64, to as many units as cpu/elementwise.cpp says."""

import numpy as np
import pytest

from disttrain import Tensor, ops
from disttrain.autodiff.ops.activation import _softplus_gradient
from disttrain.kernels import elementwise
from tests.kernels.shapes import LENGTHS

UNIT = 9 * 2.0**-24  # see cpu/elementwise.cpp
TINY = 2.0**-149  # of rounding where float32 is denormal


def check(x, guarded):
    g = np.random.default_rng(0).standard_normal(x.shape, dtype=np.float32)
    wide, size = x.astype(float), np.abs(g.astype(float))
    other = np.exp(-np.abs(wide))
    share = np.where(wide > 0, 1, other) / (1 + other)
    product = other / (1 + other) ** 2
    # what exp(-|x|) loses where it is denormal is multiplied by x, and by g
    tiny = TINY * (1 + np.abs(wide))
    for got, exact, bound in (
        (elementwise.silu(guarded.copy(x)), wide * share, UNIT * np.abs(wide) * share + tiny),
        (
            elementwise.silu_gradient(guarded.copy(g), None, guarded.copy(x, 20)),
            g * (share + wide * product),
            size * (UNIT * (share + np.abs(wide) * product) + tiny) + TINY,
        ),
        (
            elementwise.softplus(guarded.copy(x)),
            np.maximum(wide, 0) + np.log1p(other),
            UNIT * (np.maximum(wide, 0) + np.log1p(other)) + 2 * TINY,
        ),
        (
            elementwise.softplus_gradient(guarded.copy(g), guarded.copy(x, 20)),
            g * share,
            UNIT * size * share + TINY * (1 + size),
        ),
    ):
        assert (np.abs(got.run() - exact) <= bound).all()


@pytest.mark.parametrize("length", LENGTHS)
def test_any_length(length, instruction_set, guarded):
    check(np.random.default_rng(length).standard_normal(length, dtype=np.float32) * 3, guarded)


def test_any_size(instruction_set, guarded):
    near = np.linspace(-110, 110, 100_003)
    far = np.geomspace(1e-45, 3e38, 10_007)
    check(np.concatenate([near, far, -far, [0, -0.0]]).astype(np.float32), guarded)


@pytest.mark.parametrize("length", [5, 40])
def test_nan_and_infinities_come_out_as_in_the_definitions(length, instruction_set):
    x, g = np.resize(np.array([np.nan, np.inf, -np.inf, 3e38, -3e38], np.float32), length), np.ones(length, np.float32)
    for compute, definition, given in (
        (elementwise.silu, ops.silu.definition, (x,)),
        (elementwise.silu_gradient, ops.silu.gradient(0).definition, (g, None, x)),
        (elementwise.softplus, ops.softplus.definition, (x,)),
        (elementwise.softplus_gradient, _softplus_gradient.definition, (g, x)),
    ):
        with np.errstate(all="ignore"):
            expected = definition(*given)
        np.testing.assert_array_equal(compute(*given).run(), expected)


@pytest.mark.parametrize("name", ["silu", "softplus"])
def test_ops_and_their_gradients_compute_by_the_kernels(name, instruction_set):
    x = Tensor(np.linspace(-3, 3, 40, dtype=np.float32), requires_grad=True)
    y = getattr(ops, name)(x)
    assert y.call.op is getattr(ops, name)
    np.testing.assert_array_equal(y.data, getattr(elementwise, name)(x.data).run())
    g = np.linspace(2, 1, 40, dtype=np.float32)
    y.backward(g)
    given = (g, None, x.data) if name == "silu" else (g, x.data)
    np.testing.assert_array_equal(x.grad, getattr(elementwise, f"{name}_gradient")(*given).run())


def test_the_definitions_compute_what_kernels_do_not(instruction_set):
    x = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    for other in (x.astype(float), x.T, x.astype(np.float16)):
        assert elementwise.silu(other) is None
        assert elementwise.softplus(other) is None
    assert elementwise.silu_gradient(x[:1], None, x) is None
    assert elementwise.softplus_gradient(x.T, x) is None
    np.testing.assert_array_equal(ops.softplus(x.T), ops.softplus.definition(x.T))
