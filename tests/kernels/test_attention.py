"""Attention of heads and its gradients by kernels are their definitions in float64, on any instruction set."""

from typing import NamedTuple

import numpy as np
import pytest

from disttrain import Tensor, ops
from disttrain.autodiff.ops.attention import _attention_of_heads as op
from disttrain.kernels import attention as kernels
from tests.kernels.shapes import ATTENTIONS

UNIT = 2.0**-24
EVERY_SHAPE = pytest.mark.parametrize("shape", ATTENTIONS, ids=str)
SEEN = ["all", "causal", "samples", "heads", "plain", "strided", "both"]


def arrays(shape):
    """Return query, key, value and the cotangent of the output, float32."""
    generator = np.random.default_rng(sum(shape))
    return [generator.standard_normal(size, dtype=np.float32) for size in shape.sizes]


def options(shape, seen):
    """Return a mask, in which every query sees its first key, and whether it is causal."""
    s, h, q, k = shape.samples, shape.heads, shape.queries, shape.keys
    draw = np.random.default_rng(k).random
    shapes = {"samples": (s, 1, q, k), "heads": (1, h, q, k), "plain": (q, k), "both": (s, 1, 1, k)}
    mask = None
    if seen == "strided":
        mask = np.swapaxes(draw((s, 2 * k, h, q)) < 0.6, 1, 3)[..., ::2].transpose(0, 2, 1, 3)
    elif seen in shapes:
        mask = (draw(shapes[seen]) < 0.6).astype({"samples": bool, "heads": np.int32}.get(seen, np.int64))
    if mask is not None:
        mask[..., 0] = 1
    return mask, seen in ("causal", "both")


class Exact(NamedTuple):
    """What the definition gives in float64 and how far float32 may be from it, to first order in `UNIT`."""

    values: list
    bounds: list


def exact(shape, query, key, value, g, mask, causal):
    """Return output and gradients with bounds: each sum of n products is off by at most n roundings of its terms."""
    wide = [Tensor(a.astype(float), requires_grad=True) for a in (query, key, value)]
    y = ops.attention_of_heads(*wide, heads=shape.heads, mask=mask, causal=causal)
    y.backward(g.astype(float))

    def apart(x):
        return x.astype(float).reshape(*x.shape[:2], shape.heads, -1).transpose(0, 2, 1, 3)

    def joined(x):
        return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)

    q, k, v, g = map(apart, (query, key, value, g))
    scale = shape.width**-0.5
    p = ops.attention_weights(q, k, mask=mask, causal=causal)
    swap = lambda x: np.swapaxes(x, -1, -2)  # noqa: E731
    size = scale * (abs(q) @ swap(abs(k))) * (p > 0)
    # exp multiplies what a score, less the largest, is off by its value; above the fraction's line and below
    of_p = UNIT * (2 * (shape.width + 5) * size.max(-1, keepdims=True) + shape.keys + 8)
    of_y = (of_p + shape.keys * UNIT) * (p @ abs(v))
    dp = g @ swap(v)
    of_dp = shape.value_width * UNIT * (abs(g) @ swap(abs(v)))
    mean = (p * dp).sum(-1, keepdims=True)
    of_mean = (p * (of_dp + (of_p + shape.keys * UNIT) * abs(dp))).sum(-1, keepdims=True)
    ds = scale * p * (dp - mean)
    of_ds = scale * p * (of_p * abs(dp - mean) + of_dp + of_mean + 4 * UNIT * (abs(dp) + abs(mean)))
    bounds = [
        of_y,
        of_ds @ abs(k) + shape.keys * UNIT * (abs(ds) @ abs(k)),
        swap(of_ds) @ abs(q) + shape.queries * UNIT * (swap(abs(ds)) @ abs(q)),
        swap((of_p + shape.queries * UNIT) * p) @ abs(g),
    ]
    # a tenth more for what is of second order, and the smallest normal number, below which there are no digits
    return Exact([y.data, *(t.grad for t in wide)], [1.1 * joined(b) + 2.0**-126 for b in bounds])


@pytest.mark.parametrize("seen", SEEN)
@EVERY_SHAPE
def test_value_and_gradients_are_those_of_float64(shape, seen, instruction_set, guarded):
    query, key, value, g = map(guarded.copy, arrays(shape))
    mask, causal = options(shape, seen)
    args, attributes = (query, key, value, mask), {"heads": shape.heads, "causal": causal}
    y = kernels.attention_of_heads(*args, **attributes).run()
    joined = kernels.attention_of_heads_gradients(g, None, *args, **attributes).run()
    assert y.dtype == joined.dtype == np.float32
    ends = np.cumsum([query.size, key.size, value.size])
    got = [y, *(part.reshape(a.shape) for part, a in zip(np.split(joined.ravel(), ends[:2]), args, strict=False))]
    expected = exact(shape, query, key, value, g, mask, causal)
    for name, a, b, bound in zip("yqkv", got, *expected, strict=True):
        assert (abs(a - b) <= bound).all(), (name, (abs(a - b) / bound).max())


@pytest.mark.parametrize("shape", [s for s in ATTENTIONS if s.samples > 1], ids=str)
def test_a_sample_s_bits_do_not_depend_on_the_batch(shape, instruction_set):
    *args, g = arrays(shape)
    attributes = {"heads": shape.heads, "causal": True}
    y = kernels.attention_of_heads(*args, None, **attributes).run()
    grads = op.gradient(0, 1, 2)(g, None, *args, None, **attributes)
    parts = np.split(grads.ravel(), np.cumsum([args[0].size, args[1].size]))
    one, one_g = [a[1:2] for a in args], g[1:2]
    np.testing.assert_array_equal(kernels.attention_of_heads(*one, None, **attributes).run(), y[1:2])
    alone = op.gradient(0, 1, 2)(one_g, None, *one, None, **attributes)
    alone = np.split(alone.ravel(), np.cumsum([one[0].size, one[1].size]))
    for a, part, all_of_it in zip(args, alone, parts, strict=True):
        np.testing.assert_array_equal(part.reshape(a[1:2].shape), all_of_it.reshape(a.shape)[1:2])


@pytest.mark.parametrize("causal", [False, True])
def test_large_scores_neither_overflow_nor_vanish(causal, instruction_set):
    """Such as have one weight of 1 in each row, whatever the others' roundings."""
    query = np.eye(37, 64, dtype=np.float32)[None] * 1e4
    key, value = np.eye(37, 64, dtype=np.float32)[None] * 1e4, np.arange(37.0 * 3, dtype=np.float32).reshape(1, 37, 3)
    y = kernels.attention_of_heads(query, key, value, None, heads=1, causal=causal).run()
    np.testing.assert_array_equal(y, value)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_reach_the_queries_that_see_them(bad, instruction_set):
    shape = ATTENTIONS[-1]
    query, key, value, g = arrays(shape)
    key[1, 3, 0] = bad  # of the first head; 0 * infinity in a query's score is excluded
    with np.errstate(invalid="ignore"):
        expected = op.definition(query, key, value, None, heads=shape.heads, causal=False)
    y = kernels.attention_of_heads(query, key, value, None, heads=shape.heads, causal=False).run()
    np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
    assert np.isnan(y).any()
    assert not np.isnan(y).all()
    grads = kernels.attention_of_heads_gradients(g, None, query, key, value, None, heads=shape.heads, causal=False)
    assert np.isnan(grads.run()).any()
    y = kernels.attention_of_heads(query, key, value, None, heads=shape.heads, causal=True).run()
    assert not np.isnan(y[:, :3]).any()  # they come before it
    assert not np.isnan(y[0]).any()


def test_a_query_that_sees_nothing_gets_a_mean_of_all_values(instruction_set):
    shape = ATTENTIONS[-1]
    query, key, value, _ = arrays(shape)
    mask = np.ones((shape.queries, shape.keys), bool)
    mask[2] = False
    y = kernels.attention_of_heads(query, key, value, mask, heads=shape.heads, causal=False).run()
    # scores of less than 32 vanish beside -1e9: all weights are the same
    np.testing.assert_allclose(y[:, 2], value.mean(1), rtol=0, atol=2 * shape.keys * UNIT * abs(value).max())


def test_the_op_s_gradients_are_the_kernel_s(instruction_set):
    for shape in ATTENTIONS:  # some with keys as queries, some not
        *args, g = arrays(shape)
        tensors = [Tensor(a, requires_grad=True) for a in args]
        y = ops.attention_of_heads(*tensors, heads=shape.heads, causal=True)
        assert y.call.op is op
        y.backward(g)
        joined = kernels.attention_of_heads_gradients(g, None, *args, None, heads=shape.heads, causal=True).run()
        got = np.concatenate([t.grad.ravel() for t in tensors])
        np.testing.assert_array_equal(got, joined.ravel())
        assert [t.grad.shape for t in tensors] == [a.shape for a in args]


def test_floating_point_operations_are_those_of_products_with_seen_keys():
    query, key, value = np.ones((2, 3, 4)), np.ones((2, 5, 4)), np.ones((2, 5, 6))
    for causal, seen in ((False, 15), (True, 1 + 2 + 3)):
        attributes = {"heads": 2, "causal": causal}
        assert op.flops(None, query, key, value, None, **attributes) == 2 * 2 * seen * (4 + 6)
        backward = op.gradient(0, 1, 2).flops(None, None, None, query, key, value, None, **attributes)
        assert backward == 2 * 2 * seen * (3 * 4 + 2 * 6)


X = np.ones((2, 3, 4), np.float32)


@pytest.mark.parametrize(
    ("args", "heads"),
    [
        ((X.astype(float),) * 3, 2),
        ((X, np.asfortranarray(X), X), 2),
        ((X[:0], X, X), 2),
        ((X, X[:1], X), 2),
        ((X, X[..., :2].copy(), X), 2),
        ((X, X, X[:, :2].copy()), 2),
        ((X, X, X), 3),
        ((X, X[:, :0], X[:, :0]), 2),
        ((X, X, X, np.ones((3, 3))), 2),
        ((X, X, X, np.ones((3, 3), np.int8)), 2),
        ((X, X, X, np.ones((2, 3, 3), bool)[:, None].repeat(4, 1)), 2),
        ((X[0], X[0], X[0]), 2),
    ],
)
def test_the_definition_computes_what_the_kernel_does_not(args, heads, instruction_set):
    query, key, value, mask = (*args, None)[:4]
    attributes = {"heads": heads, "causal": False}
    assert kernels.attention_of_heads(query, key, value, mask, **attributes) is None
    assert kernels.attention_of_heads_gradients(query, None, query, key, value, mask, **attributes) is None
