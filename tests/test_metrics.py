"""Metrics against counting by hand, in parts and whole."""

import numpy as np
import pytest

from disttrain import Tensor, metrics
from disttrain.errors import ConfigError, ShapeError
from disttrain.metrics import F1Score, Precision, Recall

RANDOM = np.random.default_rng(0)
N = 60
SCORES = RANDOM.dirichlet(np.ones(3), N)
LABELS = RANDOM.integers(0, 3, N)
ONE_HOT = np.eye(3)[LABELS]
# many outputs on both sides of the threshold, some on it
OUTPUTS = RANDOM.integers(0, 9, (N, 3)) / 8
BITS = RANDOM.integers(0, 2, (N, 3))


def count(actual, predicted):
    """Return true positives, predictions and targets of two sequences of bool."""
    pairs = list(zip(actual, predicted, strict=True))
    return sum(a and p for a, p in pairs), sum(bool(p) for _, p in pairs), sum(bool(a) for a, _ in pairs)


def f1(actual, predicted):
    found, predictions, targets = count(actual, predicted)
    if not found:
        return 0.0
    precision, recall = found / predictions, found / targets
    return 2 * precision * recall / (precision + recall)


def largest(scores):
    return [max(range(len(row)), key=lambda i: row[i]) for row in scores]


RIGHT = sum(p == t for p, t in zip(largest(SCORES), LABELS, strict=True)) / N


@pytest.mark.parametrize(("name", "y_true"), [
    ("sparse_categorical_accuracy", LABELS), ("sparse_categorical_accuracy", LABELS[:, None]),
    ("categorical_accuracy", ONE_HOT), ("accuracy", LABELS), ("accuracy", LABELS[:, None]), ("accuracy", ONE_HOT),
    ("acc", LABELS),
])  # fmt: skip
def test_categorical_accuracies_count_the_largest_output(name, y_true):
    assert metrics.get(name)(y_true, SCORES) == RIGHT


def test_accuracy_of_sequences_counts_every_place():
    scores, labels = SCORES.reshape(10, 6, 3), LABELS.reshape(10, 6)
    assert metrics.get("accuracy")(labels, scores) == RIGHT
    assert metrics.get("accuracy")(ONE_HOT.reshape(10, 6, 3), scores) == RIGHT


@pytest.mark.parametrize("name", ["binary_accuracy", "accuracy"])
def test_binary_accuracy_counts_outputs_above_the_threshold(name):
    expected = sum((o > 0.5) == b for o, b in zip(OUTPUTS[:, 0], BITS[:, 0], strict=True)) / N
    for y_true in (BITS[:, 0], BITS[:, :1]):
        for y_pred in (OUTPUTS[:, 0], OUTPUTS[:, :1]):
            assert metrics.get(name)(y_true, y_pred) == expected
    below = metrics.BinaryAccuracy(threshold=0.125)(BITS, OUTPUTS)
    assert below == sum((o > 0.125) == b for o, b in zip(OUTPUTS.flat, BITS.flat, strict=True)) / (3 * N)


def test_errors_are_means_over_all_outputs():
    y_true, y_pred = RANDOM.standard_normal((4, 3)), RANDOM.standard_normal((4, 3))
    pairs = list(zip(y_true.flat, y_pred.flat, strict=True))
    tolerance = 30 * 2**-53
    for name in ("mse", "mean_squared_error"):
        assert metrics.get(name)(y_true, y_pred) == pytest.approx(
            sum((t - p) ** 2 for t, p in pairs) / 12, rel=tolerance
        )
    for name in ("mae", "mean_absolute_error"):
        assert metrics.get(name)(y_true, y_pred) == pytest.approx(sum(abs(t - p) for t, p in pairs) / 12, rel=tolerance)
    assert metrics.get("mse")(np.zeros(3), np.ones((3, 1))) == 1


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_errors_of_narrow_outputs_are_computed_in_float64(dtype):
    y_pred = np.full(10_000, 300, dtype)  # its square is no float16
    assert metrics.get("mse")(np.zeros(10_000), y_pred) == 90_000
    assert metrics.get("mae")(np.zeros(10_000), y_pred) == 300


@pytest.mark.parametrize("threshold", [0.5, 0.25])
def test_precision_and_recall_are_counted_over_all_outputs(threshold):
    found, predictions, targets = count(BITS.ravel() == 1, OUTPUTS.ravel() > threshold)
    assert Precision(threshold=threshold)(BITS, OUTPUTS) == found / predictions
    assert Recall(threshold=threshold)(BITS, OUTPUTS) == found / targets


def test_integer_labels_of_several_classes_count_as_one_hot():
    for metric in (Precision(), Recall(), F1Score(average="macro"), F1Score(threshold=0.4, average="micro")):
        assert metric(LABELS, SCORES) == metric(LABELS[:, None], SCORES) == metric(ONE_HOT, SCORES)


PREDICTED = np.eye(3)[largest(SCORES)] == 1
EACH = [f1(ONE_HOT[:, c] == 1, PREDICTED[:, c]) for c in range(3)]
SUPPORT = ONE_HOT.sum(0)


@pytest.mark.parametrize(("average", "expected"), [
    (None, EACH),
    ("macro", sum(EACH) / 3),
    ("weighted", sum(s * n for s, n in zip(EACH, SUPPORT, strict=True)) / N),
    ("micro", f1(ONE_HOT.ravel() == 1, PREDICTED.ravel())),
])  # fmt: skip
def test_f1_averages(average, expected):
    np.testing.assert_allclose(F1Score(average=average)(LABELS, SCORES), expected, rtol=20 * 2**-53)


def test_f1_with_a_threshold_counts_every_output():
    expected = [f1(BITS[:, c] == 1, OUTPUTS[:, c] > 0.3) for c in range(3)]
    np.testing.assert_allclose(F1Score(threshold=0.3)(BITS, OUTPUTS), expected, rtol=10 * 2**-53)


def test_f1_of_one_output():
    expected = f1(BITS[:, 0] == 1, OUTPUTS[:, 0] > 0.5)
    for y_pred in (OUTPUTS[:, :1], OUTPUTS[:, 0]):
        for y_true in (BITS[:, :1], BITS[:, 0]):
            got = F1Score(threshold=0.5)(y_true, y_pred)
            assert got.shape == (1,)
            assert got[0] == pytest.approx(expected, rel=10 * 2**-53)
        with pytest.raises(ConfigError, match="needs a threshold"):
            F1Score()(BITS[:, 0], y_pred)


def test_what_was_never_predicted_or_never_true_scores_zero():
    nothing, everything = np.zeros((4, 1)), np.ones((4, 1))
    assert Precision()(everything, nothing) == 0
    assert Recall()(nothing, everything) == 0
    assert F1Score(threshold=0.5, average="macro")(nothing, nothing) == 0
    assert F1Score(average="weighted", threshold=0.5)(nothing, everything) == 0
    np.testing.assert_array_equal(F1Score()(np.array([0, 0]), np.array([[0.9, 0.1, 0], [0.8, 0, 0.2]])), [1, 0, 0])


EVERY = [
    ("accuracy", LABELS, SCORES), ("binary_accuracy", BITS, OUTPUTS), ("categorical_accuracy", ONE_HOT, SCORES),
    ("sparse_categorical_accuracy", LABELS, SCORES), ("mse", BITS, OUTPUTS), ("mae", BITS, OUTPUTS),
    ("precision", BITS, OUTPUTS), ("recall", BITS, OUTPUTS), ("precision", LABELS, SCORES),
    ("f1_score", LABELS, SCORES), (F1Score(average="micro", threshold=0.5), BITS, OUTPUTS),
    (F1Score(average="macro", threshold=0.5), BITS[:, 0], OUTPUTS[:, 0]),
]  # fmt: skip


@pytest.mark.parametrize(("metric", "y_true", "y_pred"), EVERY, ids=lambda value: str(getattr(value, "name", "")))
@pytest.mark.parametrize("cuts", [[1], [20, 20, 50], [0, N]], ids=str)
def test_sums_over_parts_are_sums_over_the_whole(metric, y_true, y_pred, cuts):
    """Exactly: counts, and squares of eighths, are whole multiples of 1/64."""
    metric = metrics.get(metric)
    whole = metric.sums(y_true, y_pred)
    parts = [metric.sums(t, p) for t, p in zip(np.split(y_true, cuts), np.split(y_pred, cuts), strict=True)]
    assert whole.dtype == "float64"
    assert {part.shape for part in parts} == {whole.shape}
    np.testing.assert_array_equal(sum(parts), whole)
    np.testing.assert_array_equal(metric.result(sum(parts)), metric(y_true, y_pred))


def test_tensors_are_predictions():
    assert metrics.get("accuracy")(Tensor(LABELS), Tensor(SCORES, requires_grad=True)) == RIGHT


def test_names_are_keys_and_unknown_ones_an_error():
    assert metrics.get("acc").name == "acc"
    assert Precision().name == "precision"
    assert Precision(name="p@9", threshold=0.9).name == "p@9"
    metric = Recall()
    assert metrics.get(metric) is metric
    with pytest.raises(ConfigError, match="unknown metric 'acuracy'; did you mean 'accuracy'"):
        metrics.get("acuracy")
    with pytest.raises(ConfigError, match="a metric is"):
        metrics.get(Recall)
    with pytest.raises(ConfigError, match="unknown average 'macr'; did you mean 'macro'"):
        F1Score(average="macr")


@pytest.mark.parametrize(
    "metric", [Precision("p", 0.1), Recall("r", 0.1), F1Score("f", "macro", 0.1), metrics.BinaryAccuracy("b", 0.1)]
)
def test_a_configuration_makes_the_metric_again(metric):
    again = type(metric)(**metric.get_config())
    assert again.get_config() == metric.get_config()
    assert again(BITS, OUTPUTS) == metric(BITS, OUTPUTS)


def test_targets_that_do_not_fit_are_an_error_with_both_shapes():
    with pytest.raises(ShapeError, match=r"\(5, 3\) do not fit predictions of shape \(4, 2\)"):
        metrics.get("mse")(np.ones((5, 3)), np.ones((4, 2)))


def test_scikit_learn_agrees():
    sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed: an oracle of averages")
    for average in (None, "macro", "micro", "weighted"):
        expected = sklearn.f1_score(LABELS, largest(SCORES), average=average)
        np.testing.assert_allclose(F1Score(average=average)(LABELS, SCORES), expected, rtol=20 * 2**-53)
        expected = sklearn.f1_score(BITS, OUTPUTS > 0.5, average=average)
        np.testing.assert_allclose(F1Score(average=average, threshold=0.5)(BITS, OUTPUTS), expected, rtol=20 * 2**-53)
    assert Precision()(BITS, OUTPUTS) == sklearn.precision_score(BITS, OUTPUTS > 0.5, average="micro")
    assert Recall()(BITS, OUTPUTS) == sklearn.recall_score(BITS, OUTPUTS > 0.5, average="micro")
