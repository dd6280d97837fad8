"""Rules of what ops make of joined arrays: what they promise is so, to the bit."""

import functools
import importlib
import itertools
import pkgutil

import numpy as np
import pytest

from disttrain import ops
from disttrain.autodiff import joining
from disttrain.autodiff.op import Op
from disttrain.autodiff.trace import Seen
from disttrain.comm import functional
from tests.autodiff.cases import CASES
from tests.autodiff.test_plan import step_of, traced

PARTS = 3


def larger():
    """Return functions and arguments of sizes at which kernels compute, in blocks and with something left over."""
    generator = np.random.default_rng(0)

    def normal(*shape):
        return generator.normal(size=shape).astype(np.float32)

    labels = generator.integers(0, 33, (5, 7))
    conv2d = functools.partial(ops.conv2d, strides=(1, 1), padding=((1, 1), (1, 1)))
    pools = {"size": (2, 2), "strides": (2, 2), "padding": ((0, 1), (0, 1))}
    return {
        "dense": (functools.partial(ops.dense, activation="relu"), [normal(33, 130), normal(130, 70), normal(70)]),
        "dense of sequences": (ops.dense, [normal(2, 19, 40), normal(40, 24), normal(24)]),
        "dense of few columns": (ops.dense, [normal(33, 130), normal(130, 3), normal(3)]),
        "matmul of batches": (ops.matmul, [normal(3, 17, 20), normal(3, 20, 9)]),
        "deep matmul": (ops.matmul, [normal(13, 900), normal(900, 40)]),
        "winograd": (conv2d, [normal(3, 9, 7, 16), normal(3, 3, 16, 24), normal(24)]),
        "conv2d": (conv2d, [normal(3, 9, 7, 3), normal(3, 3, 3, 8), normal(8)]),
        "max_pool2d": (lambda x: ops.max_pool2d(x, **pools), [normal(3, 7, 9, 5)]),
        "average_pool2d": (lambda x: ops.average_pool2d(x, **pools), [normal(3, 7, 9, 5)]),
        "layer_norm": (lambda *a: ops.layer_norm(*a, epsilon=1e-3), [normal(5, 7, 33), normal(33), normal(33)]),
        "batch_norm": (
            lambda *a: ops.batch_norm_of_batch(*a, epsilon=1e-3)[0],
            [normal(5, 7, 33), normal(33), normal(33)],
        ),
        "gelu": (ops.gelu, [normal(5, 1031)]),
        "silu": (ops.silu, [normal(5, 1031)]),
        "softplus": (ops.softplus, [normal(5, 1031)]),
        "softmax": (ops.softmax, [normal(5, 7, 33)]),
        "log_softmax": (ops.log_softmax, [normal(5, 7, 33)]),
        "cross-entropy": (lambda x: ops.sparse_softmax_cross_entropy(x, labels), [normal(5, 7, 33)]),
        "dense cross-entropy": (ops.softmax_cross_entropy, [normal(5, 33), abs(normal(5, 33))]),
        "embedding": (lambda table: ops.embedding(labels, table), [normal(33, 12)]),
        "attention": (
            lambda q, k, v: ops.attention_of_heads(q, k, v, heads=3, causal=True),
            [normal(2, 17, 24), normal(2, 17, 24), normal(2, 17, 24)],
        ),
        "lstm": (ops.lstm, [normal(3, 5, 7), normal(7, 24), normal(6, 24), normal(24)]),
        "gru": (ops.gru, [normal(3, 5, 7), normal(7, 18), normal(6, 18), normal(2, 18)]),
        "global mean": (lambda x: ops.mean(x, axis=(1, 2)), [normal(3, 4, 5, 6)]),
        "sum of rows": (lambda x: ops.sum(x, axis=-1), [normal(33, 1030)]),
        "relu": (ops.relu, [normal(33, 1030)]),
    }  # fmt: skip


LARGER = larger()


def calls_of(function, arrays):
    """Return the calls of a step, with what they are given: of each shape of call, one."""
    held = {}

    trace = traced(step_of(function), arrays)
    values = {n: seen.array for n, seen in enumerate(trace.seen) if seen.array is not None}
    for call in trace.calls:
        args = [values[arg] if isinstance(arg, int) else arg.value for arg in call.args]
        values[call.output] = call.op(*args, **call.attributes)
        held[call.op.name, str([getattr(a, "shape", a) for a in args]), str(call.attributes)] = call, args
    return list(held.values())


def axes_of(args):
    """Yield which arguments could be joined, and along which axis, counted from the front or from the end."""
    arrays = [n for n, a in enumerate(args) if hasattr(a, "shape")]
    for count in range(1, len(arrays) + 1):
        for joined in itertools.combinations(arrays, count):
            for axis in range(-4, 4):
                at = [axis + (args[n].ndim if axis < 0 else 0) for n in joined]
                if all(0 <= a < args[n].ndim for a, n in zip(at, joined, strict=True)):
                    yield tuple(dict(zip(joined, at, strict=True)).get(n) for n in range(len(args)))


def check(call, args):
    """Compare what an op makes of joined arrays with what it makes of each, wherever its rule says that it may."""
    made = call.op(*args, **call.attributes)
    checked = 0
    for axes in set(axes_of(args)):
        seen = [Seen(a.shape, a.dtype) if hasattr(a, "shape") else a for a in args]
        found = call.op.joined(axes, Seen(made.shape, made.dtype), *seen, **call.attributes)
        if found is None or any(own is not None and own != its for own, its in zip(axes, found[1], strict=True)):
            continue
        axis, wanted = found
        # other values in each part, of those that the op takes
        parts = [
            [a if w is None else np.roll(a, p).copy() for a, w in zip(args, wanted, strict=True)] for p in range(PARTS)
        ]
        whole = [
            a if w is None else np.concatenate([part[n] for part in parts], w)
            for n, (a, w) in enumerate(zip(args, wanted, strict=True))
        ]
        attributes = dict(call.attributes)
        if "shape" in attributes:
            attributes["shape"] = tuple(n * PARTS if i == axis else n for i, n in enumerate(made.shape))
        exact = call.op.joined is joining.elementwise
        if call.op.launcher and not exact and call.op.launcher(*whole, **attributes) is None:
            continue  # then no plan joins it
        expected = np.concatenate([call.op(*part, **call.attributes) for part in parts], axis)
        got = call.op(*whole, **attributes)
        assert (got.shape, got.dtype, got.tobytes()) == (expected.shape, expected.dtype, expected.tobytes()), (
            call,
            axes,
        )
        checked += 1
    return checked


@pytest.mark.parametrize("case", [c for c in CASES if c.op != "dropout"], ids=str)
def test_what_an_op_makes_of_joined_arrays_is_what_it_makes_of_each(case):
    for call, args in calls_of(case.call, [np.asarray(a, np.float32) for a in case.args]):
        check(call, args)


@pytest.mark.parametrize("name", LARGER)
def test_kernels_give_the_same_bits_whatever_is_computed_with_them(name):
    function, arrays = LARGER[name]
    checked = [check(call, args) for call, args in calls_of(function, arrays)]
    assert sum(checked) > 0


def every_op():
    names = [module.name for module in pkgutil.iter_modules(ops.__path__)]
    modules = [importlib.import_module(f"{ops.__name__}.{name}") for name in names]
    found = {value.name: value for module in modules for value in vars(module).values() if isinstance(value, Op)}
    gradients = [g for value in found.values() for g in getattr(value, "_gradients", {}).values() if g.launcher]
    return [*found.values(), *gradients]


def test_every_op_has_a_rule():
    without = [op for op in every_op() if op.joined is None and not op.is_in_place]
    assert [op.name for op in without] == ["_by_own_moments"]  # which is never called itself
    assert functional.total.of_parts is not None


def test_what_depends_on_several_parts_is_not_joined():
    x = Seen((6, 4), np.dtype("float32"))
    column = Seen((4,), np.dtype("float32"))
    assert joining.reduced((0,), column, x, axis=0) is None
    assert joining.reduced((0,), column, x, axis=-2) is None
    assert joining.reduced((0,), column, x) is None
    assert joining.reduced((1,), column, x, axis=0) is None  # may be summed in another order
    assert ops.softmax.joined((0,), x, x, axis=0) is None
    assert ops.softmax.joined((1,), x, x) is None
    assert joining.each(0, inner=1)((0, 0), x, x, x) is None  # weights that are not the same
    assert joining.broadcast((0,), x, Seen((1, 4), x.dtype), shape=(6, 4)) is None
    assert joining.transposed((0,), x, x) is None
    assert joining.picked((0,), column, x, index=3) is None
    assert joining.picked((0,), x, x, index=slice(0, 6, 2)) is None
    assert joining.beside((0, 0), x, x, x, axis=-2) is None
