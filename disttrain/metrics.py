"""Metrics, in Keras's vocabulary: sums over samples, and what follows from them.

A metric adds up float64 sums, which ranks add up in turn before anything is divided: N workers give exactly
what one gives.
"""

import inspect
from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from disttrain.autodiff.op import array_of
from disttrain.backend import to_host
from disttrain.errors import ConfigError, ShapeError, unknown_name

HostArray = np.ndarray[Any, Any]


class Metric(ABC):
    """Base of all metrics.

    Args:
        name: key in the history; by default the metric's own.
    """

    name = ""

    def __init__(self, name: str | None = None) -> None:
        self.name = name or type(self).name

    @abstractmethod
    def sums(self, y_true: HostArray, y_pred: HostArray) -> HostArray:
        """Return what these samples add, float64, of a shape that depends on the number of outputs only."""

    def result(self, sums: HostArray) -> Any:
        """Return the metric's value for all samples that were added: by default ``sums[0] / sums[1]``."""
        return float(sums[0] / sums[1]) if sums[1] else 0.0

    def __call__(self, y_true: Any, y_pred: Any) -> Any:
        """Return the metric's value for these samples."""
        return self.result(self.sums(_host(y_true), _host(y_pred)))

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this metric again."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}


class _Mean(Metric):
    """Base of metrics that are a mean of a value per sample."""

    def sums(self, y_true: HostArray, y_pred: HostArray) -> HostArray:
        """Return the sum of the values and their number."""
        values = self.values(y_true, y_pred)
        return np.array([values.sum(dtype=np.float64), values.size])

    @abstractmethod
    def values(self, y_true: HostArray, y_pred: HostArray) -> HostArray:
        """Return the values to average."""


class SparseCategoricalAccuracy(_Mean):
    """How often the largest output is the one of the integer label."""

    name = "sparse_categorical_accuracy"

    def values(self, y_true: HostArray, y_pred: HostArray) -> HostArray:
        """Return whether each sample is right."""
        return np.asarray(y_pred.argmax(axis=-1) == y_true.reshape(y_pred.shape[:-1]))


class CategoricalAccuracy(_Mean):
    """How often the largest output is where the one-hot target is."""

    name = "categorical_accuracy"

    def values(self, y_true: HostArray, y_pred: HostArray) -> HostArray:
        """Return whether each sample is right."""
        return np.asarray(y_pred.argmax(axis=-1) == _like(y_true, y_pred).argmax(axis=-1))


class BinaryAccuracy(_Mean):
    """How often an output is on the right side of `threshold`."""

    name = "binary_accuracy"

    def __init__(self, name: str | None = None, threshold: float = 0.5) -> None:
        super().__init__(name)
        self.threshold = threshold

    def values(self, y_true: HostArray, y_pred: HostArray) -> HostArray:
        """Return whether each output is right."""
        return np.asarray((y_pred > self.threshold) == (_like(y_true, y_pred) > 0.5))


class Accuracy(_Mean):
    """Binary, categorical or sparse accuracy, whichever the shapes of targets and outputs say.

    What Keras makes of the string ``"accuracy"``.
    """

    name = "accuracy"

    def values(self, y_true: HostArray, y_pred: HostArray) -> HostArray:
        """Return whether each sample is right."""
        if y_pred.ndim == 1 or y_pred.shape[-1] == 1:
            return BinaryAccuracy().values(y_true, y_pred)
        if y_true.shape == y_pred.shape:
            return CategoricalAccuracy().values(y_true, y_pred)
        return SparseCategoricalAccuracy().values(y_true, y_pred)


class MeanSquaredError(_Mean):
    """The mean of ``(y_true - y_pred)**2``."""

    name = "mean_squared_error"

    def values(self, y_true: HostArray, y_pred: HostArray) -> HostArray:
        """Return the squares."""
        return np.asarray(np.square(_like(y_true, y_pred).astype(np.float64) - y_pred))


class MeanAbsoluteError(_Mean):
    """The mean of ``|y_true - y_pred|``."""

    name = "mean_absolute_error"

    def values(self, y_true: HostArray, y_pred: HostArray) -> HostArray:
        """Return the differences."""
        return np.abs(_like(y_true, y_pred).astype(np.float64) - y_pred)


class Precision(Metric):
    """The share of positive predictions that are right; every output above `threshold` is one.

    Args:
        name: key in the history.
        threshold: an output above it predicts its class.
    """

    name = "precision"

    def __init__(self, name: str | None = None, threshold: float = 0.5) -> None:
        super().__init__(name)
        self.threshold = threshold

    def sums(self, y_true: HostArray, y_pred: HostArray) -> HostArray:
        """Return the number of true positives and of positive predictions."""
        actual, predicted = _actual(y_true, y_pred), y_pred > self.threshold
        return np.array([(actual & predicted).sum(), predicted.sum()], dtype=np.float64)


class Recall(Metric):
    """The share of positive targets that are found; every output above `threshold` finds one.

    Args:
        name: key in the history.
        threshold: an output above it predicts its class.
    """

    name = "recall"

    def __init__(self, name: str | None = None, threshold: float = 0.5) -> None:
        super().__init__(name)
        self.threshold = threshold

    def sums(self, y_true: HostArray, y_pred: HostArray) -> HostArray:
        """Return the number of true positives and of positive targets."""
        actual, predicted = _actual(y_true, y_pred), y_pred > self.threshold
        return np.array([(actual & predicted).sum(), actual.sum()], dtype=np.float64)


class F1Score(Metric):
    """``2 * precision * recall / (precision + recall)`` of each class, or averaged.

    Args:
        name: key in the history.
        average: None: one value per class, an array; ``"macro"``: their mean; ``"weighted"``: their mean by
            the number of targets; ``"micro"``: of all classes counted together.
        threshold: an output above it predicts its class; None: the largest output does.
    """

    name = "f1_score"

    def __init__(self, name: str | None = None, average: str | None = None, threshold: float | None = None) -> None:
        super().__init__(name)
        if average not in (None, "macro", "micro", "weighted"):
            raise unknown_name("average", average, ("macro", "micro", "weighted", "None"))
        self.average = average
        self.threshold = threshold

    def sums(self, y_true: HostArray, y_pred: HostArray) -> HostArray:
        """Return the numbers of true positives, predictions and targets, shape ``(3, classes)``."""
        if y_pred.ndim == 1:
            y_pred = y_pred[:, None]
        actual = _actual(y_true, y_pred)
        if self.threshold is not None:
            predicted = y_pred > self.threshold
        elif y_pred.shape[-1] == 1:
            raise ConfigError("F1Score of a single output needs a threshold: F1Score(threshold=0.5)")
        else:
            predicted = y_pred.argmax(axis=-1)[..., None] == np.arange(y_pred.shape[-1])
        axes = tuple(range(y_pred.ndim - 1))
        counts = [(actual & predicted).sum(axis=axes), predicted.sum(axis=axes), actual.sum(axis=axes)]
        return np.array(counts, dtype=np.float64)

    def result(self, sums: HostArray) -> Any:
        """Return the score, or the scores of the classes."""
        found, predicted, actual = sums
        if self.average == "micro":
            return float(_ratio(2 * found.sum(), predicted.sum() + actual.sum()))
        scores = _ratio(2 * found, predicted + actual)
        if self.average == "macro":
            return float(scores.mean())
        if self.average == "weighted":
            return float(_ratio((scores * actual).sum(), actual.sum()))
        return scores


_KNOWN: dict[str, type[Metric]] = {
    "acc": Accuracy,
    "accuracy": Accuracy,
    "binary_accuracy": BinaryAccuracy,
    "categorical_accuracy": CategoricalAccuracy,
    "f1_score": F1Score,
    "mae": MeanAbsoluteError,
    "mean_absolute_error": MeanAbsoluteError,
    "mean_squared_error": MeanSquaredError,
    "mse": MeanSquaredError,
    "precision": Precision,
    "recall": Recall,
    "sparse_categorical_accuracy": SparseCategoricalAccuracy,
}


def get(metric: str | Metric) -> Metric:
    """Return the metric of a name, which is also its key in the history, or `metric` itself when it is one."""
    if isinstance(metric, Metric):
        return metric
    if not isinstance(metric, str):
        raise ConfigError(f"a metric is a name or a Metric, not {metric!r}")
    if metric not in _KNOWN:
        raise unknown_name("metric", metric, _KNOWN)
    return _KNOWN[metric](name=metric)


def _actual(y_true: HostArray, y_pred: HostArray) -> HostArray:
    """Return which outputs should be positive, shape as `y_pred`; integer labels count as one-hot."""
    classes = y_pred.shape[-1]
    if y_pred.ndim > 1 and classes > 1 and y_true.shape != y_pred.shape:
        return np.asarray(y_true.reshape(y_pred.shape[:-1])[..., None] == np.arange(classes))
    return np.asarray(_like(y_true, y_pred) > 0.5)


def _like(y_true: HostArray, y_pred: HostArray) -> HostArray:
    if y_true.size != y_pred.size:
        raise ShapeError(f"targets of shape {y_true.shape} do not fit predictions of shape {y_pred.shape}")
    return np.asarray(y_true.reshape(y_pred.shape))


def _ratio(total: Any, weight: Any) -> HostArray:
    """Return ``total / weight``, 0 where nothing was counted."""
    zero = np.zeros_like(np.asarray(total))
    return np.asarray(np.divide(total, weight, out=zero, where=np.asarray(weight) != 0))


def _host(values: Any) -> HostArray:
    return np.asarray(to_host(array_of(values)))
