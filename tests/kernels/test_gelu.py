"""GELU by kernels is its definition in float64, to as many units as cpu/gelu.cpp says."""

import numpy as np
import pytest

from disttrain import Tensor, ops
from disttrain.kernels import gelu
from tests.kernels.shapes import LENGTHS

BOTH = pytest.mark.parametrize("approximate", [False, True])


def exact(x, approximate):
    """Return value and slope of the definition in float64."""
    wide = Tensor(x.astype(float), requires_grad=True)
    y = ops.gelu(wide, approximate=approximate)
    assert y.call.op is not ops.gelu
    y.backward(np.ones(x.shape))
    return y.data, wide.grad


def check(x, approximate, guarded):
    value, slope = exact(x, approximate)
    g = np.random.default_rng(0).standard_normal(x.shape, dtype=np.float32)
    got = gelu.gelu(guarded.copy(x), approximate=approximate).run()
    # what is denormal is rounded to 2**-149
    assert (np.abs(got - value) <= 3 * np.spacing(np.abs(x)).astype(float)).all()
    got = gelu.gelu_gradient(guarded.copy(g), None, guarded.copy(x, 20), approximate=approximate).run()
    assert (np.abs(got - g * slope) <= 2.0**-22 * np.abs(g) + 2.0**-149).all()


@BOTH
@pytest.mark.parametrize("length", LENGTHS)
def test_any_length(length, approximate, instruction_set, guarded):
    check(np.random.default_rng(length).standard_normal(length, dtype=np.float32) * 2, approximate, guarded)


@BOTH
def test_any_size(approximate, instruction_set, guarded):
    near = np.linspace(-12, 12, 100_003, dtype=np.float32)
    far = np.geomspace(1e-45, 1e15, 10_007).astype(np.float32)  # whose third power float64 and float32 hold
    check(np.concatenate([near, far, -far, [0, -0.0]]).astype(np.float32), approximate, guarded)


@BOTH
def test_limits(approximate, instruction_set):
    x = np.array([3e38, -3e38, 1e25, -1e25], np.float32)
    got = gelu.gelu(x, approximate=approximate).run()
    np.testing.assert_array_equal(got, [x[0], 0, x[2], 0])
    slope = gelu.gelu_gradient(np.ones_like(x), None, x, approximate=approximate).run()
    np.testing.assert_array_equal(slope, [1, 0, 1, 0])
    x = np.array([np.nan, np.inf, -np.inf], np.float32)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(
            gelu.gelu(x, approximate=approximate).run(), ops.gelu.definition(x, approximate=approximate)
        )
    assert np.isnan(gelu.gelu_gradient(np.ones_like(x), None, x, approximate=approximate).run()[0])


def test_exact_is_the_default_and_the_op_computes_by_the_kernel(instruction_set):
    x = Tensor(np.linspace(-3, 3, 40, dtype=np.float32), requires_grad=True)
    y = ops.gelu(x)
    assert y.call.op is ops.gelu
    y.sum().backward()
    np.testing.assert_array_equal(y.data, gelu.gelu(x.data, approximate=False).run())
    assert gelu.gelu(x.data.astype(float)) is None
