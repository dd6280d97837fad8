"""Losses against their formulas, exact where probabilities are rounded, and what wrong targets are told."""

import numpy as np
import pytest

from disttrain import Tensor, check_grads, losses, no_grad, ops
from disttrain.errors import ConfigError, DataError, ShapeError
from disttrain.losses import (
    BinaryCrossentropy,
    CategoricalCrossentropy,
    Loss,
    MeanSquaredError,
    SparseCategoricalCrossentropy,
)

RANDOM = np.random.default_rng(0)
LOGITS = RANDOM.standard_normal((5, 4))
LABELS = np.array([0, 3, 1, 1, 2])
ONE_HOT = np.eye(4)[LABELS]
SOFT = RANDOM.dirichlet(np.ones(4), 5)
SIGMOIDS = RANDOM.uniform(0.1, 0.9, (5, 4))
BITS = RANDOM.integers(0, 2, (5, 4))


def probabilities(z):
    return np.exp(z) / np.exp(z).sum(-1, keepdims=True)


P = probabilities(LOGITS)
SURPRISE = -np.log(np.where(BITS, SIGMOIDS, 1 - SIGMOIDS))
WRONG_WAY = np.log1p(np.exp(LOGITS * (1 - 2 * BITS)))
# name, loss, targets, predictions, the expected loss of each sample
FORMULAS = {
    "categorical": (CategoricalCrossentropy(), SOFT, P, -(SOFT * np.log(P)).sum(-1)),
    "categorical, not normalized": (CategoricalCrossentropy(), ONE_HOT, 7 * P, -(ONE_HOT * np.log(P)).sum(-1)),
    "categorical, logits": (CategoricalCrossentropy(from_logits=True), SOFT, LOGITS, -(SOFT * np.log(P)).sum(-1)),
    "sparse": (SparseCategoricalCrossentropy(), LABELS, P, -np.log(P[range(5), LABELS])),
    "sparse, column": (SparseCategoricalCrossentropy(), LABELS[:, None], P, -np.log(P[range(5), LABELS])),
    "sparse, floats": (SparseCategoricalCrossentropy(), LABELS * 1.0, P, -np.log(P[range(5), LABELS])),
    "sparse, logits": (SparseCategoricalCrossentropy(from_logits=True), LABELS, LOGITS, -np.log(P[range(5), LABELS])),
    "binary": (BinaryCrossentropy(), BITS, SIGMOIDS, SURPRISE.mean(-1)),
    "binary, logits": (BinaryCrossentropy(from_logits=True), BITS, LOGITS, WRONG_WAY.mean(-1)),
    "binary, one output": (BinaryCrossentropy(), BITS[:, 0], SIGMOIDS[:, :1], SURPRISE[:, 0]),
    "squares": (MeanSquaredError(), SOFT, LOGITS, ((SOFT - LOGITS) ** 2).mean(-1)),
    "squares, one output": (MeanSquaredError(), SOFT[:, 0], LOGITS[:, :1], (SOFT - LOGITS)[:, 0] ** 2),
    "squares, no axis": (MeanSquaredError(), SOFT[:, :1], LOGITS[:, 0], (SOFT - LOGITS)[:, 0] ** 2),
}  # fmt: skip
EVERY = pytest.mark.parametrize(("loss", "y_true", "y_pred", "expected"), FORMULAS.values(), ids=FORMULAS)


@EVERY
def test_each_sample_has_the_loss_of_the_formula(loss, y_true, y_pred, expected):
    got = loss.per_sample(y_true, Tensor(y_pred))
    # the probability path clips the others too before it divides by their sum: 4 * EPSILON at most
    atol = 1e-6 if "sparse" in loss.name and not loss.from_logits else 100 * 2**-53
    np.testing.assert_allclose(got.data, expected, rtol=0, atol=atol)
    assert loss(y_true, y_pred).data == pytest.approx(expected.mean(), abs=atol)


@EVERY
def test_gradients_agree_with_finite_differences(loss, y_true, y_pred, expected):
    check_grads(lambda y: loss.per_sample(y_true, y), y_pred)


@EVERY
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_losses_keep_the_outputs_dtype(loss, y_true, y_pred, expected, dtype):
    y = Tensor(y_pred.astype(dtype), requires_grad=True)
    value = loss(y_true, y)
    value.backward()
    assert value.dtype == y.grad.dtype == dtype
    assert value.data == pytest.approx(expected.mean(), rel=0, abs=50 * 4 * (2**-11 if dtype == "float16" else 2**-24))


@EVERY
def test_an_empty_batch_has_no_losses(loss, y_true, y_pred, expected):
    y = Tensor(y_pred[:0], requires_grad=True)
    got = loss.per_sample(y_true[:0], y)
    assert got.shape == (0,)
    got.sum().backward()
    assert y.grad.shape == y.shape


PAIRS = [
    (CategoricalCrossentropy, ops.softmax, SOFT),
    (SparseCategoricalCrossentropy, ops.softmax, LABELS),
    (BinaryCrossentropy, ops.sigmoid, BITS),
]


@pytest.mark.parametrize(("cls", "activation", "y_true"), PAIRS)
def test_a_loss_behind_its_activation_is_the_loss_of_the_logits(cls, activation, y_true):
    results = []
    for loss, f in ((cls(from_logits=True), lambda z: z), (cls(), activation)):
        z = Tensor(LOGITS, requires_grad=True)
        value = loss(y_true, f(z))
        value.backward()
        results.append((value.data, z.grad))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])
    with no_grad():  # nothing recorded: from the probabilities, which are not rounded to 0 or 1 here
        other = cls()(y_true, activation(Tensor(LOGITS)))
    assert other.data == pytest.approx(results[0][0], abs=1e-6)


@pytest.mark.parametrize(("cls", "activation", "y_true"), [
    (CategoricalCrossentropy, ops.softmax, np.array([[0.0, 1]])),
    (SparseCategoricalCrossentropy, ops.softmax, np.array([1])),
    (BinaryCrossentropy, ops.sigmoid, np.array([[0.0, 1]])),
])  # fmt: skip
def test_a_loss_is_exact_where_the_probability_underflows(cls, activation, y_true):
    z = Tensor(np.array([[400.0, -400.0]], np.float32), requires_grad=True)
    loss = cls()(y_true, activation(z))
    loss.backward()
    # softmax: 800, with a gradient of (1, -1); sigmoids: 400 each, half of that in their mean
    binary = cls is BinaryCrossentropy
    assert loss.data == (400 if binary else 800)
    np.testing.assert_array_equal(z.grad, [[0.5, -0.5]] if binary else [[1, -1]])


def test_probabilities_of_zero_are_clipped_as_in_keras():
    certain = np.array([[1.0, 0.0]])
    for loss, y_true in ((CategoricalCrossentropy(), [[0.0, 1.0]]), (SparseCategoricalCrossentropy(), [1])):
        assert loss(np.array(y_true), certain).data == pytest.approx(-np.log(1e-7), rel=1e-6)
    assert BinaryCrossentropy()(np.array([[0.0, 1.0]]), certain).data == pytest.approx(-np.log(1e-7), rel=1e-6)


def test_a_softmax_along_another_axis_is_no_softmax_over_the_classes():
    z = Tensor(np.arange(9.0).reshape(3, 3) ** 2 / 10, requires_grad=True)
    y = ops.softmax(z, axis=0)
    for loss, y_true in ((CategoricalCrossentropy(), np.eye(3)), (SparseCategoricalCrossentropy(), np.arange(3))):
        assert loss(y_true, y).data == pytest.approx(loss(y_true, y.data).data, rel=1e-12)


def test_outputs_of_several_axes_are_averaged_within_their_sample():
    z, labels = RANDOM.standard_normal((3, 2, 5, 4)), RANDOM.integers(0, 4, (3, 2, 5))
    logs = np.log(probabilities(z))
    expected = [-np.mean([logs[i, j, k, labels[i, j, k]] for j in range(2) for k in range(5)]) for i in range(3)]
    tolerance = {"rtol": 0, "atol": 100 * 2**-53}
    sparse = SparseCategoricalCrossentropy(from_logits=True)
    sparse.check(labels, z.shape)
    np.testing.assert_allclose(sparse.per_sample(labels, Tensor(z)).data, expected, **tolerance)
    categorical = CategoricalCrossentropy(from_logits=True)
    np.testing.assert_allclose(categorical.per_sample(np.eye(4)[labels], Tensor(z)).data, expected, **tolerance)
    squares = MeanSquaredError().per_sample(z * 0, Tensor(z))
    np.testing.assert_allclose(squares.data, (z**2).reshape(3, -1).mean(1), **tolerance)


CHECKS = [
    (SparseCategoricalCrossentropy(), np.array([0, 4, 1]), (None, 4), DataError, r"label 4 of sample 1 .* 3 \(1 of 3"),
    (SparseCategoricalCrossentropy(), np.array([0, 1, -1]), (None, 4), DataError, "label -1 of sample 2"),
    (SparseCategoricalCrossentropy(), np.array([0.0, 1.5]), (None, 4), DataError, r"label 1\.5 of sample 1"),
    (SparseCategoricalCrossentropy(), np.array([np.nan, 1]), (None, 4), DataError, "label nan of sample 0"),
    (SparseCategoricalCrossentropy(), np.eye(4), (None, 4), ShapeError, r"one-hot .*'categorical_cr"),
    (SparseCategoricalCrossentropy(), np.array([0, 1]), (None, 1), ShapeError, "binary_crossentropy"),
    (CategoricalCrossentropy(), np.array([0, 1]), (None, 4), ShapeError, r"integer labels .*'sparse_cat"),
    (CategoricalCrossentropy(), np.array([[0], [1]]), (None, 4), ShapeError, "sparse_categorical_crossentropy"),
    (CategoricalCrossentropy(), np.eye(3), (None, 4), ShapeError, r"\(3, 3\) .*\(samples, 4\)$"),
    (CategoricalCrossentropy(), np.ones((2, 1)), (None, 1), ShapeError, "one class is no choice"),
    (BinaryCrossentropy(), np.array([0, 1, 2]), (None, 1), DataError, "target 2 of sample 2 is outside of 0 to 1"),
    (BinaryCrossentropy(), np.array([[0.5], [np.nan]]), (None, 1), DataError, "target nan of sample 1"),
    (BinaryCrossentropy(), np.zeros((3, 2)), (None, 1), ShapeError, r"\(3, 2\) do not fit .*\(samples, 1\)"),
    (MeanSquaredError(), np.zeros((3, 2)), (None, 3), ShapeError, r"\(3, 2\) do not fit .*\(samples, 3\)"),
]  # fmt: skip


@pytest.mark.parametrize(("loss", "y_true", "output_shape", "error", "message"), CHECKS)
def test_wrong_targets_are_told_what_is_wrong(loss, y_true, output_shape, error, message):
    with pytest.raises(error, match=message):
        loss.check(y_true, output_shape)


@EVERY
def test_right_targets_pass(loss, y_true, y_pred, expected):
    loss.check(y_true, (None, *y_pred.shape[1:]))
    loss.check(y_true[:0], (None, *y_pred.shape[1:]))


@EVERY
def test_targets_of_another_number_of_samples_are_an_error(loss, y_true, y_pred, expected):
    with pytest.raises(ShapeError, match="targets of shape"):
        loss(y_true[:1], y_pred)


def absolute(y_true, y_pred):
    return abs(y_pred - y_true).sum(axis=-1)


@pytest.mark.parametrize(("function", "expected"), [
    (absolute, [3, 7]),
    (lambda t, y: abs(y - t), [1.5, 3.5]),  # a value for each output: their mean
    (lambda t, y: absolute(t, y).mean(), [5, 5]),  # a mean counts for every sample
])  # fmt: skip
def test_functions_are_losses(function, expected):
    loss = losses.get(function)
    y_true, y = np.zeros((2, 2)), Tensor(np.array([[1.0, 2], [3, 4]]), requires_grad=True)
    np.testing.assert_array_equal(loss.per_sample(y_true, y).data, expected)
    value = loss(y_true, y)
    assert value.data == np.mean(expected)
    value.backward()
    assert y.grad.all()
    loss.check(np.zeros(7), (None, 2))  # only the function knows


def test_functions_that_return_something_else_are_an_error():
    with pytest.raises(ConfigError, match="'<lambda>' must return a Tensor, not float"):
        losses.get(lambda t, y: 1.0)(np.ones(2), np.ones(2))
    with pytest.raises(ShapeError, match=r"shape \(1, 1\) for 3 samples"):
        losses.get(lambda t, y: (y * t).sum(axis=(0, 1), keepdims=True))(np.ones((3, 2)), np.ones((3, 2)))


def test_names_are_keras():
    assert type(losses.get("mse")) is MeanSquaredError
    for cls in (MeanSquaredError, BinaryCrossentropy, CategoricalCrossentropy, SparseCategoricalCrossentropy):
        assert type(losses.get(cls.name)) is cls
    with pytest.raises(ConfigError, match="unknown loss 'sparse_categorical'; did you mean 'sparse_cat"):
        losses.get("sparse_categorical")


@pytest.mark.parametrize("cls", [BinaryCrossentropy, CategoricalCrossentropy, SparseCategoricalCrossentropy])
def test_a_configuration_makes_the_loss_again(cls):
    assert cls(**cls(from_logits=True).get_config()).from_logits
    assert isinstance(losses.get(cls()), Loss)
    assert MeanSquaredError().get_config() == {}
