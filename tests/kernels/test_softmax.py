"""Softmax, its losses and gradients by kernels are their definitions in float64, within derived bounds."""

import numpy as np
import pytest

from disttrain import Tensor, ops
from disttrain.autodiff.ops.softmax import _log_softmax_gradient, _softmax_gradient
from disttrain.kernels import softmax
from tests.kernels.shapes import ROWS

EVERY_SHAPE = pytest.mark.parametrize("shape", ROWS, ids=str)
UNIT = 2.0**-24  # of rounding to float32
TINY = 2.0**-149  # of rounding where float32 is denormal


class Rows:
    """Arguments, and the largest relative error of softmax: see `test_softmax`."""

    def __init__(self, shape, scale=3.0, shift=0.0):
        generator = np.random.default_rng(shape)
        self.x, self.g, self.targets = generator.standard_normal((3, *shape), dtype=np.float32)
        self.x = self.x * np.float32(scale) + np.float32(shift)
        self.losses_g = generator.standard_normal(shape[:-1], dtype=np.float32)
        self.labels = generator.integers(-shape[-1], shape[-1], shape[:-1])
        self.wide = self.x.astype(float)
        self.probabilities = ops.softmax.definition(self.wide)
        distance = (self.wide.max(axis=-1, keepdims=True) - self.wide).max(axis=-1, keepdims=True, initial=0)
        # exp is right to one unit in the last place, its argument to half a unit; once each above and below the bar,
        # where n are added up, and the quotient and the product are rounded
        self.error = UNIT * (2 * (2 + distance) + shape[-1] + 3)


CASES = pytest.mark.parametrize(("scale", "shift"), [(3, 0), (30, 1e4), (1e-3, -1e6), (1e4, 0)])


@CASES
@EVERY_SHAPE
def test_softmax(shape, scale, shift, instruction_set, guarded):
    rows = Rows(shape, scale, shift)
    got = softmax.softmax(guarded.copy(rows.x)).run()
    assert (np.abs(got - rows.probabilities) <= rows.error * rows.probabilities + TINY).all()
    y = rows.probabilities.astype(np.float32)
    got = softmax.softmax_gradient(guarded.copy(rows.g), guarded.copy(y)).run()
    y, g = y.astype(float), rows.g.astype(float)
    exact = y * (g - (g * y).sum(axis=-1, keepdims=True))
    sizes = np.abs(g) + np.abs(g * y).sum(axis=-1, keepdims=True)
    assert (np.abs(got - exact) <= UNIT * (shape[-1] + 3) * y * sizes + TINY).all()


@CASES
@EVERY_SHAPE
def test_log_softmax(shape, scale, shift, instruction_set, guarded):
    rows = Rows(shape, scale, shift)
    got = softmax.log_softmax(guarded.copy(rows.x)).run()
    exact = ops.log_softmax.definition(rows.wide)
    # a relative error of the sum is an absolute one of its logarithm; then three roundings, of numbers no larger
    assert (np.abs(got - exact) <= rows.error + UNIT * (3 * np.abs(exact) + 3 * np.log(shape[-1]))).all()
    y = exact.astype(np.float32)
    got = softmax.log_softmax_gradient(guarded.copy(rows.g), guarded.copy(y)).run()
    y, g = y.astype(float), rows.g.astype(float)
    total, sizes = g.sum(axis=-1, keepdims=True), np.abs(g).sum(axis=-1, keepdims=True)
    exact = g - np.exp(y) * total
    # exp is right to 1.2 units in the last place; n are added up; a product, and a difference
    bound = UNIT * ((2.4 + shape[-1] + 2) * np.exp(y) * sizes + np.abs(g)) + TINY * (1 + sizes)
    assert (np.abs(got - exact) <= bound).all()


@CASES
@EVERY_SHAPE
def test_cross_entropy_of_labels(shape, scale, shift, instruction_set, guarded):
    rows = Rows(shape, scale, shift)
    logits, labels = guarded.copy(rows.x), rows.labels
    got = softmax.sparse_softmax_cross_entropy(logits, labels).run()
    exact = ops.sparse_softmax_cross_entropy.definition(rows.wide, labels)
    # a relative error of the sum is an absolute one of its logarithm; then three roundings, of numbers no larger
    bound = rows.error[..., 0] + UNIT * (3 * np.abs(exact) + 3 * np.log(shape[-1]))
    assert (np.abs(got - exact) <= bound).all()
    got = softmax.sparse_softmax_cross_entropy_gradient(guarded.copy(rows.losses_g), None, logits, labels).run()
    targets = np.eye(shape[-1])[labels]
    g = rows.losses_g.astype(float)[..., None]
    exact = g * (rows.probabilities - targets)
    bound = np.abs(g) * ((rows.error + 3 * UNIT) * rows.probabilities + 2 * UNIT * targets) + TINY * (1 + np.abs(g))
    assert (np.abs(got - exact) <= bound).all()


@CASES
@EVERY_SHAPE
def test_cross_entropy_of_targets(shape, scale, shift, instruction_set, guarded):
    rows = Rows(shape, scale, shift)
    logits, targets = guarded.copy(rows.x), guarded.copy(rows.targets)
    got = softmax.softmax_cross_entropy(logits, targets).run()
    t = rows.targets.astype(float)
    exact = ops.softmax_cross_entropy.definition(rows.wide, t)
    logarithms = np.abs(ops.log_softmax.definition(rows.wide))
    each = rows.error + UNIT * ((shape[-1] + 3) * logarithms + 3 * np.log(shape[-1]))
    assert (np.abs(got - exact) <= (np.abs(t) * each).sum(axis=-1)).all()
    got = softmax.softmax_cross_entropy_gradient(guarded.copy(rows.losses_g), None, logits, targets).run()
    g = rows.losses_g.astype(float)[..., None]
    exact = g * (rows.probabilities * t.sum(axis=-1, keepdims=True) - t)
    sizes = rows.probabilities * np.abs(t).sum(axis=-1, keepdims=True)
    bound = np.abs(g) * ((rows.error + UNIT * (shape[-1] + 3)) * sizes + 2 * UNIT * np.abs(t))
    assert (np.abs(got - exact) <= bound + TINY * (1 + np.abs(g))).all()


@pytest.mark.parametrize("values", [[np.nan, 1], [np.inf, 0], [-np.inf, 2], [np.inf, -np.inf], [-np.inf, -np.inf]])
@pytest.mark.parametrize("length", [2, 17, 40])
def test_nan_and_infinities_come_out_as_in_the_definition(values, length, instruction_set):
    x = np.resize(np.array(values, np.float32), (2, length))
    x[1] = np.linspace(-1, 1, length)
    labels, g = np.array([length - 2, 1]), np.ones(2, np.float32)
    targets = np.eye(length, dtype=np.float32)[labels]
    for compute, definition, given in [
        (softmax.softmax, ops.softmax.definition, (x,)),
        (softmax.log_softmax, ops.log_softmax.definition, (x,)),
        (softmax.sparse_softmax_cross_entropy, ops.sparse_softmax_cross_entropy.definition, (x, labels)),
        (softmax.softmax_cross_entropy, ops.softmax_cross_entropy.definition, (x, targets)),
        (
            softmax.sparse_softmax_cross_entropy_gradient,
            ops.sparse_softmax_cross_entropy.gradient(0).definition,
            (g, None, x, labels),
        ),
        (
            softmax.softmax_cross_entropy_gradient,
            ops.softmax_cross_entropy.gradient(0).definition,
            (g, None, x, targets),
        ),
    ]:
        with np.errstate(invalid="ignore"):
            expected = definition(*given)
        got = compute(*given).run()
        np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
        sure = ~np.isnan(expected)
        np.testing.assert_array_equal(np.isinf(got[sure]), np.isinf(expected[sure]))
        np.testing.assert_allclose(got[sure], expected[sure], rtol=0, atol=(length + 10) * 2**-23)


@EVERY_SHAPE
def test_a_row_has_the_same_bits_in_any_batch(shape, instruction_set, guarded):
    rows = Rows(shape)
    whole = softmax.softmax(rows.x).run()
    losses = softmax.sparse_softmax_cross_entropy(rows.x, rows.labels).run()
    for n in range(shape[0]):
        assert softmax.softmax(guarded.copy(rows.x[n], 20)).run().tobytes() == whole[n].tobytes()
        alone = softmax.sparse_softmax_cross_entropy(rows.x[n : n + 1], rows.labels[n : n + 1]).run()
        assert alone.tobytes() == losses[n : n + 1].tobytes()


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5)])
@pytest.mark.parametrize("sparse", [True, False])
def test_a_mean_s_cotangent_is_read_as_it_is_broadcast(shape, sparse, instruction_set):
    rows = Rows(shape)
    given = rows.labels if sparse else rows.targets
    loss = ops.sparse_softmax_cross_entropy if sparse else ops.softmax_cross_entropy
    kernel = softmax.sparse_softmax_cross_entropy_gradient if sparse else softmax.softmax_cross_entropy_gradient
    one, first = np.full(1, 0.5, np.float32), np.arange(shape[0], dtype=np.float32)
    broadcast = [
        np.broadcast_to(one, shape[:-1]),
        np.broadcast_to(first.reshape(-1, *[1] * (len(shape) - 2)), shape[:-1]),
    ]
    for g in broadcast:
        got = kernel(g, None, rows.x, given).run()
        np.testing.assert_array_equal(got, kernel(np.ascontiguousarray(g), None, rows.x, given).run())
        np.testing.assert_allclose(
            got, loss.gradient(0).definition(g, None, rows.x, given), rtol=0, atol=2**-18 * g.max()
        )


@pytest.mark.parametrize("label", [5, -6, 2**40])
def test_a_label_that_names_no_class_is_an_error_as_in_the_definition(label, instruction_set):
    x, labels, g = np.zeros((3, 5), np.float32), np.array([0, label, 1]), np.ones(3, np.float32)
    for compute in (
        lambda: ops.sparse_softmax_cross_entropy.definition(x, labels),
        lambda: ops.sparse_softmax_cross_entropy(x, labels),
        lambda: ops.sparse_softmax_cross_entropy.gradient(0)(g, None, x, labels),
    ):
        with pytest.raises(IndexError):
            compute()


def test_the_definition_computes_what_kernels_do_not(instruction_set):
    x, labels = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4), np.array([0, 3, 1])
    assert softmax.softmax(x, axis=0) is None
    assert softmax.log_softmax(x, axis=0) is None
    assert softmax.log_softmax_gradient(x[:1], x) is None
    assert softmax.softmax(x.astype(float)) is None
    assert softmax.softmax(x.T) is None
    assert softmax.softmax(np.zeros((2, 0), np.float32)) is None
    assert softmax.sparse_softmax_cross_entropy(x, labels.astype(np.int32)) is None
    assert softmax.sparse_softmax_cross_entropy(x, labels[:, None]) is None
    assert softmax.softmax_cross_entropy(x, x[:1]) is None
    np.testing.assert_array_equal(ops.softmax(x, axis=0), ops.softmax.definition(x, axis=0))


@pytest.mark.parametrize("sparse", [True, False])
def test_losses_and_softmax_compute_by_kernels(sparse, instruction_set):
    rows = Rows((4, 6))
    x = Tensor(rows.x, requires_grad=True)
    if sparse:
        loss = ops.sparse_softmax_cross_entropy(x, rows.labels)
        assert loss.call.op is ops.sparse_softmax_cross_entropy
    else:
        loss = ops.softmax_cross_entropy(x, rows.targets)
        assert loss.call.op is ops.softmax_cross_entropy
    loss.sum().backward()
    assert x.grad.dtype == np.float32
    y = ops.softmax(x)
    assert y.call.op is ops.softmax
    assert _softmax_gradient.launcher is softmax.softmax_gradient
    y = ops.log_softmax(x)
    np.testing.assert_array_equal(y.data, softmax.log_softmax(x.data).run())
    x.grad = None
    y.backward(rows.g)
    np.testing.assert_array_equal(x.grad, softmax.log_softmax_gradient(rows.g, y.data).run())
    assert _log_softmax_gradient.launcher is softmax.log_softmax_gradient
