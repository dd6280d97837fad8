"""Pooling's kernels are their definitions to the bit, on any instruction set."""

import numpy as np
import pytest

from disttrain import ops
from disttrain.autodiff.ops import pooling as definitions
from disttrain.kernels import pooling
from tests.kernels.shapes import POOLS

EVERY_SHAPE = pytest.mark.parametrize("shape", POOLS, ids=str)


def cases(shape, values):
    """Return for each kernel its op, arrays and attributes; equal values are common."""
    generator = np.random.default_rng(sum(shape.size))
    window = {"size": shape.window, "strides": shape.strides, "padding": shape.padding}
    size = (shape.images, *shape.size, shape.channels)
    x = generator.choice(np.array(values, np.float32), size)
    g = generator.standard_normal((shape.images, *shape.out, shape.channels), dtype=np.float32)
    return {
        "max_pool2d": (ops.max_pool2d, (x,), window),
        "put_at_maximum": (definitions._put_at_maximum, (g, x), window),
        "average_pool2d": (ops.average_pool2d, (x,), window),
        "spread": (definitions._spread, (g,), {"shape": size, **window}),
    }


@pytest.mark.parametrize(
    "values",
    [[-2, -1.5, 0.25, 3.7], [1, np.nan, 2], [-np.inf, -np.inf, -np.inf, 5], [np.inf, -np.inf, 1]],
    ids=["finite", "nan", "low", "infinite"],
)
@EVERY_SHAPE
def test_is_the_definition_to_the_bit(shape, values, instruction_set, guarded):
    for name, (op, arrays, attributes) in cases(shape, values).items():
        got = getattr(pooling, name)(*map(guarded.copy, arrays), **attributes).run()
        with np.errstate(invalid="ignore", divide="ignore"):  # inf - inf; padding alone has a mean of 0 / 0
            expected = op.definition(*arrays, **attributes)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, expected, err_msg=name)


def test_nan_in_a_cotangent_reaches_what_it_reaches_in_the_definition(instruction_set):
    x = np.arange(2 * 6 * 6 * 17, dtype=np.float32).reshape(2, 6, 6, 17) % 7
    g = np.ones((2, 3, 3, 17), np.float32)
    g[0, 1, 1, 3], g[1, 2, 0, 16] = np.nan, np.inf
    window = {"size": (2, 2), "strides": (2, 2), "padding": ((0, 0), (0, 0))}
    with np.errstate(invalid="ignore"):
        expected = definitions._put_at_maximum.definition(g, x, **window)
    np.testing.assert_array_equal(pooling.put_at_maximum(g, x, **window).run(), expected)


@pytest.mark.parametrize("change", [lambda a: a.astype(float), lambda a: np.asfortranarray(a)], ids=["double", "order"])
def test_the_definition_computes_what_kernels_cannot_read(change, instruction_set):
    for name, (op, arrays, attributes) in cases(POOLS[4], [1, 2]).items():
        arrays = [change(a) for a in arrays]
        assert getattr(pooling, name)(*arrays, **attributes) is None
        np.testing.assert_array_equal(op(*arrays, **attributes), op.definition(*arrays, **attributes))
