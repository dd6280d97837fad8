"""Batch normalization by kernels is its definition in float64, within derived bounds."""

import numpy as np
import pytest

from disttrain import Tensor, check_grads, ops
from disttrain.autodiff.ops import normalization
from disttrain.comm import threads as ranks
from disttrain.data_parallel import total_over
from disttrain.kernels import batch_norm
from tests.kernels.shapes import ROWS

UNIT, WIDE_UNIT = 2.0**-24, 2.0**-53
EPSILON = 1e-3
SHAPES = pytest.mark.parametrize("shape", [*ROWS, (3, 2, 64), (2, 5, 130)], ids=str)
CASES = pytest.mark.parametrize(("scale", "shift"), [(1, 0), (2, 1e4), (1e-3, -5)])


class Case:
    """Arguments; statistics are those of other values, as those of a batch in parts are."""

    def __init__(self, shape, scale=1.0, shift=0.0):
        generator = np.random.default_rng(shape)
        x, self.g = generator.standard_normal((2, *shape), dtype=np.float32)
        self.x = x * np.float32(scale) + np.float32(shift)
        self.mean = generator.standard_normal(shape[-1:], dtype=np.float32) + np.float32(shift)
        self.variance = generator.uniform(0.1, 4, shape[-1:]).astype(np.float32) * np.float32(scale) ** 2
        self.gamma, self.beta = generator.uniform(-2, 2, (2, *shape[-1:])).astype(np.float32)

    def wide(self, *names):
        return [getattr(self, name).astype(float) for name in names]

    def guarded(self, guarded, *names):
        return [guarded.copy(getattr(self, name)) for name in names]


def sums_between_guards(guarded, launch, *args):
    """Return what `launch` sums up into an array of float64 between guard bytes."""
    like = launch(*args).output
    out = guarded.new_array((2 * like.size,), shift=8).view(np.float64)
    assert launch(*args, out=out).run() is out
    return out


@CASES
@SHAPES
def test_sums(shape, scale, shift, instruction_set, guarded):
    case = Case(shape, scale, shift)
    x, g, mean = case.wide("x", "g", "mean")
    axes, rows = tuple(range(len(shape) - 1)), np.prod(shape[:-1])
    centered = x - mean
    # formed in float64: only that x - mean is rounded to float32 shows
    off = UNIT * np.abs(centered)
    added = (rows + 3) * WIDE_UNIT
    for launch, names, parts in [
        (batch_norm.channel_sums, ("x",), [(x, 0)]),
        (batch_norm.square_sums, ("x", "mean"), [(centered**2, 3 * off * np.abs(centered))]),
        (batch_norm.cotangent_sums, ("g", "x", "mean"), [(g, 0), (g * centered, np.abs(g) * off)]),
    ]:
        got = sums_between_guards(guarded, launch, *case.guarded(guarded, *names))
        exact = np.concatenate([part.sum(axes) for part, _ in parts])
        bound = np.concatenate([(added * np.abs(part) + error).sum(axes) for part, error in parts])
        assert (np.abs(got[:-1] - exact) <= bound).all()
        assert got[-1] == rows
        op = getattr(normalization, f"_{launch.__name__}")
        np.testing.assert_allclose(
            op.definition(*case.wide(*names))[:-1], exact, rtol=0, atol=added * np.abs(g).size * 1e9
        )


@CASES
@SHAPES
def test_value_and_gradient(shape, scale, shift, instruction_set, guarded):
    case = Case(shape, scale, shift)
    names = ("x", "mean", "variance", "gamma", "beta")
    x, mean, variance, gamma, beta, g = case.wide(*names, "g")
    got = batch_norm.batch_norm(*case.guarded(guarded, *names), epsilon=EPSILON).run()
    rate = (variance + np.float32(EPSILON)) ** -0.5
    exact = (x - mean) * rate * gamma + beta
    # roundings: of the difference, of four steps to the scale, of the product; then of the sum
    assert (
        np.abs(got - exact) <= UNIT * (7 * np.abs((x - mean) * rate * gamma) + 2 * np.abs(exact) + np.abs(beta))
    ).all()

    sums = np.random.default_rng(1).standard_normal(2 * shape[-1] + 1) * 10
    sums[-1] = 77
    names = ("g", "x", "mean", "variance", "gamma")
    got = batch_norm.batch_norm_input(*case.guarded(guarded, *names), sums, epsilon=EPSILON).run()
    a, b = sums[: shape[-1]] / 77, sums[shape[-1] : -1] / 77
    slope = (x - mean) * rate**2 * b
    exact = (g - a - slope) * rate * gamma
    sizes = (np.abs(g) + np.abs(a) + np.abs(slope)) * np.abs(rate * gamma)
    # at most: ten roundings to the slope, two differences, five to the scale and its product
    assert (np.abs(got - exact) <= 17 * UNIT * sizes).all()
    definition = normalization._batch_norm_input.definition
    np.testing.assert_allclose(
        definition(*case.wide(*names), sums, epsilon=float(np.float32(EPSILON))),
        exact,
        rtol=0,
        atol=2**-45 * sizes.max(initial=0),
    )


def test_gradients_of_any_order_are_those_of_the_moments():
    generator = np.random.default_rng(0)
    x, gamma, beta = generator.normal(3, 2, (5, 3)), generator.uniform(0.5, 2, 3), generator.standard_normal(3)

    def of_batch(x, gamma, beta):
        return ops.batch_norm_of_batch(x, gamma, beta, epsilon=EPSILON)[0] ** 2

    check_grads(of_batch, x, gamma, beta, order=2)
    tensors = [[Tensor(a, requires_grad=True) for a in (x, gamma, beta)] for _ in range(2)]
    of_batch(*tensors[0]).sum().backward()
    mean, variance = ops.moments(tensors[1][0])
    (ops.batch_norm(tensors[1][0], mean, variance, *tensors[1][1:], epsilon=EPSILON) ** 2).sum().backward()
    for mine, expected in zip(*tensors, strict=True):
        np.testing.assert_allclose(mine.grad, expected.grad, rtol=1e-12, atol=1e-12)


def layer(comm, x, g, first, last):
    """Return value, statistics and gradients of the samples from `first` to `last`."""
    gamma, beta = np.float32([1.5, -1, 0.5, 2, 1]), np.float32([0, 1, 2, 3, 4])
    x, gamma, beta = (Tensor(a, requires_grad=True) for a in (x[first:last], gamma, beta))
    y, mean, variance = ops.batch_norm_of_batch(x, gamma, beta, epsilon=EPSILON, total=total_over(comm))
    assert y.call.op is normalization._by_own_moments
    assert mean.call is None
    y.backward(g[first:last])
    return y.data, mean.data, variance.data, x.grad, comm.all_reduce(gamma.grad), comm.all_reduce(beta.grad)


@pytest.mark.parametrize("cuts", [(0, 9, 9), (0, 4, 9), (0, 0, 2, 9)], ids=["last empty", "two", "first empty"])
def test_ranks_together_compute_what_one_does(cuts, instruction_set):
    generator = np.random.default_rng(0)
    x, g = generator.normal(2, 3, (2, 9, 4, 5)).astype(np.float32)

    def work(comm):
        return layer(comm, x, g, *cuts[comm.rank : comm.rank + 2])

    (alone,) = ranks.run(1, lambda comm: layer(comm, x, g, 0, 9))
    parts = ranks.run(len(cuts) - 1, work)
    for part in parts:
        # float64 sums in another order, rounded to float32: the next number at most
        for got, expected in zip(part[1:3], alone[1:3], strict=True):
            np.testing.assert_allclose(got, expected, rtol=2 * UNIT)
    for number in (0, 3):
        got = np.concatenate([part[number] for part in parts])
        # a change of mean and variance by a unit, of terms below 10
        np.testing.assert_allclose(got, alone[number], rtol=0, atol=100 * UNIT)
    for number in (4, 5):  # 36 terms, each changed as much
        np.testing.assert_allclose(parts[0][number], alone[number], rtol=0, atol=36 * 100 * UNIT)


def test_other_arguments_are_the_definition_s(instruction_set):
    case = Case((6, 5))
    assert batch_norm.batch_norm(case.x, case.mean, case.variance, 1.0, 0.0, epsilon=EPSILON) is None
    assert batch_norm.batch_norm(case.x, case.mean[:1], case.variance, case.gamma, case.beta, epsilon=EPSILON) is None
    assert batch_norm.channel_sums(case.x.T) is None
    assert batch_norm.cotangent_sums(case.g[:1], case.x, case.mean) is None
    x = Tensor(case.x, requires_grad=True)
    y = ops.batch_norm_of_batch(x, 1.0, 0.0, epsilon=EPSILON)[0]
    y.backward(case.g)
    exact = Tensor(case.x.astype(float), requires_grad=True)
    expected = ops.batch_norm(exact, *ops.moments(exact), 1.0, 0.0, epsilon=EPSILON)
    expected.backward(case.g.astype(float))
    np.testing.assert_allclose(y.data, expected.data, rtol=0, atol=30 * UNIT * 4)
    np.testing.assert_allclose(x.grad, exact.grad, rtol=0, atol=30 * UNIT * 8)


def test_float16_is_computed_by_the_moments(instruction_set):
    x = Tensor(np.linspace(-300, 300, 20, dtype=np.float16).reshape(10, 2), requires_grad=True)
    one, zero = np.ones(2, np.float16), np.zeros(2, np.float16)
    y, mean, variance = ops.batch_norm_of_batch(x, one, zero, epsilon=EPSILON)
    assert {a.dtype for a in (y, mean, variance)} == {np.dtype("float16")}
    expected = ops.batch_norm(x, *ops.moments(x), one, zero, epsilon=EPSILON)
    np.testing.assert_array_equal(y.data, expected.data)
