"""Recurrent layers and their gradients by kernels are their definitions in float64, on any instruction set."""

import numpy as np
import pytest

from disttrain import Tensor, ops
from disttrain.autodiff.ops import recurrent as definitions
from disttrain.kernels import recurrent as kernels
from tests.kernels.shapes import SEQUENCES

UNIT = 2.0**-24
GATES = {"lstm": 4, "gru": 3}
BOTH = pytest.mark.parametrize("name", GATES)
EVERY_SHAPE = pytest.mark.parametrize("shape", SEQUENCES, ids=str)


def arrays(shape, name):
    """Return the op's arguments and a cotangent of its output, float32; sums of products are near 1."""
    generator = np.random.default_rng(sum(shape))
    row = GATES[name] * shape.units
    sizes = (*shape[:3],), (shape.features, row), (shape.units, row), (2, row) if name == "gru" else (row,)
    made = [generator.standard_normal(size, dtype=np.float32) for size in (*sizes, (*shape[:2], shape.units))]
    made[1] /= np.float32(shape.features**0.5)
    made[2] /= np.float32(shape.units**0.5)
    return made[:4], made[4]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def with_error(name, x, w, u, b):
    """Return the output in float64 and how far that of float32 may be from it, to first order in `UNIT`.

    Errors go through sums by the sizes of their terms, through sigmoid by a quarter at most and through tanh by 1; a
    function adds 4 roundings of its own, whose values are at most 1.
    """
    x, w, u, b = (a.astype(float) for a in (x, w, u, b))
    units = len(u)
    h = of_h = c = of_c = np.zeros((len(x), units))
    outputs = []
    for t in range(x.shape[1]):
        terms = [abs(x[:, t]) @ abs(w) + abs(b if name == "lstm" else b[0])]
        terms.append(abs(h) @ abs(u) + (0 if name == "lstm" else abs(b[1])))
        from_x, from_h = x[:, t] @ w + (b if name == "lstm" else b[0]), h @ u + (0 if name == "lstm" else b[1])
        of_x, of_u = (x.shape[2] + 2) * UNIT * terms[0], of_h @ abs(u) + (units + 2) * UNIT * terms[1]
        both, of_both = from_x + from_h, of_x + of_u + UNIT * sum(terms)
        of_gate = of_both / 4 + 4 * UNIT
        part = [slice(k * units, (k + 1) * units) for k in range(GATES[name])]
        if name == "lstm":
            i, f, o = (sigmoid(both[:, part[k]]) for k in (0, 1, 3))
            g, of_g = np.tanh(both[:, part[2]]), of_both[:, part[2]] + 4 * UNIT
            of_c = of_gate[:, part[1]] * abs(c) + f * of_c + of_gate[:, part[0]] * abs(g) + i * of_g
            of_c = of_c + 3 * UNIT * (abs(f * c) + abs(i * g))
            c = f * c + i * g
            of_h = of_gate[:, part[3]] + o * (of_c + 4 * UNIT) + UNIT
            h = o * np.tanh(c)
        else:
            z, r = sigmoid(both[:, part[0]]), sigmoid(both[:, part[1]])
            k, h_k = from_x[:, part[2]], from_h[:, part[2]]
            of_k = of_x[:, part[2]] + of_gate[:, part[1]] * abs(h_k) + r * of_u[:, part[2]]
            of_k = of_k + 2 * UNIT * (abs(k) + abs(r * h_k)) + 4 * UNIT
            new = np.tanh(k + r * h_k)
            of_h = of_gate[:, part[0]] * abs(h - new) + z * of_h + (1 - z) * of_k + 4 * UNIT
            h = z * h + (1 - z) * new
        outputs.append((h, of_h))
    return (np.stack(each, 1) for each in zip(*outputs, strict=True))


@BOTH
@EVERY_SHAPE
def test_outputs_are_those_of_float64(shape, name, instruction_set, guarded):
    args, _ = arrays(shape, name)
    y = kernels.sequence(name, *map(guarded.copy, args)).run()
    assert y.dtype == np.float32
    exact, bound = with_error(name, *args)
    assert (abs(y - exact) <= 1.1 * bound).all(), (abs(y - exact) / bound).max()  # a tenth for the second order
    defined = getattr(ops, name)(*(a.astype(float) for a in args))
    np.testing.assert_allclose(defined, exact, rtol=0, atol=shape.steps * (sum(shape) + 40) * 2**-53 * 10)


@BOTH
@EVERY_SHAPE
def test_gradients_are_those_of_float64(shape, name, instruction_set, guarded):
    args, g = arrays(shape, name)
    y = kernels.sequence(name, *args).run()
    given = [guarded.copy(a) for a in (g, y, *args)]
    joined = kernels.gradients(name, True, *given).run()
    got = np.split(joined.ravel(), np.cumsum([a.size for a in args])[:-1])
    wide = [Tensor(a.astype(float), requires_grad=True) for a in args]
    getattr(ops, name)(*wide).backward(g.astype(float))
    # a chain of sums over features, units and gates in every step, and over samples: in the norm, roundings add up as
    # independent numbers do, and six of their deviations are never exceeded
    roundings = 2 * shape.steps * (shape.features + (GATES[name] + 1) * shape.units + 40) + shape.samples * shape.steps
    for part, tensor in zip(got, wide, strict=True):
        error = np.linalg.norm(part.reshape(tensor.shape) - tensor.grad)
        assert error <= 6 * np.sqrt(roundings) * UNIT * np.linalg.norm(tensor.grad)
    without = kernels.gradients(name, False, *given).run()
    np.testing.assert_array_equal(without.ravel(), joined.ravel()[args[0].size :])


@BOTH
def test_a_sample_s_bits_do_not_depend_on_the_batch(name, instruction_set):
    (x, *weights), g = arrays(SEQUENCES[4], name)
    y = kernels.sequence(name, x, *weights).run()
    of_x = kernels.gradients(name, True, g, y, x, *weights).run()[: x.size].reshape(x.shape)
    np.testing.assert_array_equal(kernels.sequence(name, x[3:5], *weights).run(), y[3:5])
    alone = kernels.gradients(name, True, g[3:5], y[3:5], x[3:5], *weights).run()
    np.testing.assert_array_equal(alone[: x[3:5].size].reshape(2, *x.shape[1:]), of_x[3:5])


def test_tanh_is_exact_to_four_units_in_its_last_place(instruction_set):
    """As a GRU gives it that has nothing else to do: ``(1 - 1 / 2) * tanh(x)``."""
    generator = np.random.default_rng(0)
    x = np.concatenate([generator.uniform(-2, 2, 9000), np.exp(generator.uniform(-80, 3, 3000)), [0, 1e38]])
    x = x.astype(np.float32).reshape(-1, 1, 1)
    kernel, recurrent_kernel = np.array([[0, 0, 1]], np.float32), np.zeros((1, 3), np.float32)
    y = 2 * kernels.sequence("gru", x, kernel, recurrent_kernel, np.zeros((2, 3), np.float32)).run()
    exact = np.tanh(x.astype(float))
    assert (abs(y - exact) <= 8 * UNIT * abs(exact) + 2.0**-149).all()


@BOTH
def test_large_sums_saturate_and_nan_stays_in_its_sample(name, instruction_set):
    (x, *weights), g = arrays(SEQUENCES[5], name)
    large = x * np.float32(1e4)
    y = kernels.sequence(name, large, *weights).run()
    with np.errstate(over="ignore"):
        expected = getattr(definitions, f"_{name}").definition(large, *weights)
    # a sum of thousands is beyond the functions' ends; a few in a thousand are not, and are off by their roundings
    assert (abs(y - expected) > 1e-4).mean() < 0.02
    assert abs(y).max() <= (1 if name == "gru" else SEQUENCES[5].steps)
    x[1, 2, 0] = np.nan
    y = kernels.sequence(name, x, *weights).run()
    assert not np.isnan(y[0]).any()
    assert not np.isnan(y[1, :2]).any()
    assert np.isnan(y[1, 2:]).all()
    assert np.isnan(kernels.gradients(name, True, g, y, x, *weights).run()).any()


@BOTH
@pytest.mark.parametrize("needs", [(True,) * 4, (False, True, True, True), (True, False, True, False)])
def test_the_op_s_gradients_are_the_kernel_s_and_no_more_than_needed(name, needs, instruction_set, monkeypatch):
    args, g = arrays(SEQUENCES[3], name)
    joined = kernels.gradients(name, True, g, kernels.sequence(name, *args).run(), *args).run()
    parts = np.split(joined.ravel(), np.cumsum([a.size for a in args])[:-1])
    calls = []
    composite = getattr(definitions, f"_{name}")
    for numbers in ((0, 1, 2, 3), (1, 2, 3)):
        gradient = composite.gradient(*numbers)
        launcher = gradient.launcher
        monkeypatch.setattr(gradient, "launcher", lambda *a, f=launcher, n=numbers, **k: calls.append(n) or f(*a, **k))
    given = [Tensor(a, requires_grad=True) if need else a for a, need in zip(args, needs, strict=True)]
    y = getattr(ops, name)(*given)
    assert y.call.op is composite
    y.backward(g)
    assert calls == [(0, 1, 2, 3) if needs[0] else (1, 2, 3)]
    for tensor, part in zip(given, parts, strict=True):
        if isinstance(tensor, Tensor):
            np.testing.assert_array_equal(tensor.grad.ravel(), part)


def test_floating_point_operations_are_those_of_products():
    x, kernel, recurrent_kernel = np.ones((2, 3, 5)), np.ones((5, 16)), np.ones((4, 16))
    args = x, kernel, recurrent_kernel, np.ones(16)
    op = definitions._lstm
    assert op.flops(None, *args) == 2 * 6 * (5 * 16 + 4 * 16)
    assert op.gradient(0, 1, 2, 3).flops(None, None, None, *args) == 3 * op.flops(None, *args)
    assert op.gradient(1, 2, 3).flops(None, None, None, *args) == 2 * 6 * (2 * 5 * 16 + 3 * 4 * 16)


X, W, U = np.ones((2, 3, 4), np.float32), np.ones((4, 12), np.float32), np.ones((3, 12), np.float32)
B = np.ones(12, np.float32)


@pytest.mark.parametrize(
    "args",
    [
        (X.astype(float), W, U, B),
        (np.asfortranarray(X), W, U, B),
        (X[0], W, U, B),
        (X[:, :0], W, U, B),
        (X, W[:3], U, B),
        (X, W, U[:, :9].copy(), B),
        (X, W, U, B[:9]),
        (X, W, U, B[None]),
    ],
)
def test_the_definition_computes_what_the_kernel_does_not(args, instruction_set):
    y = np.ones((2, 3, 3), np.float32)
    assert kernels.sequence("lstm", *args) is None
    assert kernels.gradients("lstm", True, y, y, *args) is None
