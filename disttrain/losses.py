"""Losses, in Keras's vocabulary: a value per sample, and a check of the targets that says what is wrong.

Where a model ends in softmax or sigmoid, the loss is computed from what went into that activation: the same
number, but exact where the probability is rounded to 0 or 1.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np

from disttrain.autodiff import Tensor, ops
from disttrain.autodiff.op import Op, array_of
from disttrain.backend import Array, get_array_module, to_host
from disttrain.errors import ConfigError, DataError, ShapeError, readable, unknown_name

EPSILON = 1e-7  # how near to 0 and 1 a probability may come, as in Keras


class Loss(ABC):
    """Base of all losses: `per_sample` computes, `check` looks at the targets before training starts."""

    name = ""

    @abstractmethod
    def per_sample(self, y_true: Any, y_pred: Any) -> Any:
        """Return the loss of each sample, shape ``(samples,)``.

        Args:
            y_true: targets, a Tensor: what is computed from an array is not seen by a plan.
            y_pred: the model's output, a Tensor of shape ``(samples, ...)``.
        """

    def check(self, y_true: Array, output_shape: tuple[int | None, ...]) -> None:
        """Raise DataError or ShapeError if `y_true`, all targets, cannot belong to outputs of that shape."""
        if _without_trailing_one(y_true.shape[1:]) != _without_trailing_one(output_shape[1:]):
            raise ShapeError(
                f"{self.name}: targets of shape {y_true.shape} do not fit the model's output of shape "
                f"{readable(output_shape)}"
            )

    def __call__(self, y_true: Any, y_pred: Any) -> Any:
        """Return the mean over the samples, a scalar Tensor."""
        y_pred = y_pred if isinstance(y_pred, Tensor) else Tensor(y_pred)
        y_true = get_array_module(y_pred.data).asarray(array_of(y_true))
        if y_true.shape[:1] != y_pred.shape[:1]:
            raise ShapeError(f"{self.name}: targets of shape {y_true.shape} for outputs of shape {y_pred.shape}")
        self.check(y_true, y_pred.shape)
        return self.per_sample(Tensor(y_true), y_pred).mean()

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this loss again."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}


class CategoricalCrossentropy(Loss):
    """``-sum(y_true * log(y_pred))`` for one-hot targets or distributions.

    Args:
        from_logits: whether the model's output is to go through a softmax first.
    """

    name = "categorical_crossentropy"

    def __init__(self, *, from_logits: bool = False) -> None:
        self.from_logits = from_logits

    def per_sample(self, y_true: Any, y_pred: Any) -> Any:
        """Return the loss of each sample."""
        logits = y_pred if self.from_logits else argument_of(y_pred, ops.softmax)
        y_true = _as(y_true, y_true.shape, y_pred.dtype)
        if logits is not None:
            return _flat_mean(ops.softmax_cross_entropy(logits, y_true))
        normalized = y_pred / y_pred.sum(axis=-1, keepdims=True)
        return _flat_mean(-(y_true * _safe_log(normalized)).sum(axis=-1))

    def check(self, y_true: Array, output_shape: tuple[int | None, ...]) -> None:
        """Raise ShapeError if the targets are not one-hot vectors as long as the output."""
        _check_classes(self.name, output_shape)
        if tuple(y_true.shape[1:]) != tuple(output_shape[1:]):
            hint = (
                "; for integer labels use loss='sparse_categorical_crossentropy'"
                if y_true.ndim == len(output_shape) - 1 or y_true.shape[-1] == 1
                else ""
            )
            raise ShapeError(
                f"{self.name}: targets of shape {y_true.shape} are not one-hot vectors for the model's output of "
                f"shape {readable(output_shape)}{hint}"
            )


class SparseCategoricalCrossentropy(Loss):
    """``-log(y_pred[label])`` for integer labels.

    Args:
        from_logits: whether the model's output is to go through a softmax first.
    """

    name = "sparse_categorical_crossentropy"

    def __init__(self, *, from_logits: bool = False) -> None:
        self.from_logits = from_logits

    def per_sample(self, y_true: Any, y_pred: Any) -> Any:
        """Return the loss of each sample."""
        labels = _as(y_true, y_pred.shape[:-1], "int64")
        logits = y_pred if self.from_logits else argument_of(y_pred, ops.softmax)
        if logits is None:
            logits = _safe_log(y_pred / y_pred.sum(axis=-1, keepdims=True))
        return _flat_mean(ops.sparse_softmax_cross_entropy(logits, labels))

    def check(self, y_true: Array, output_shape: tuple[int | None, ...]) -> None:
        """Raise if the labels are not integers from 0 to below the number of outputs."""
        classes = _check_classes(self.name, output_shape)
        if _without_trailing_one(y_true.shape[1:]) != tuple(output_shape[1:-1]):
            hint = "; for one-hot targets use loss='categorical_crossentropy'" if y_true.shape[-1] == classes else ""
            raise ShapeError(
                f"{self.name}: labels of shape {y_true.shape} do not fit the model's output of shape "
                f"{readable(output_shape)}: one integer per vector of outputs is expected{hint}"
            )
        values = to_host(y_true)
        if values.dtype.kind in "biu" and (not values.size or (values.min() >= 0 and values.max() < classes)):
            return  # of integers two numbers tell all
        wrong = (values != np.floor(values)) | (values < 0) | (values >= classes)
        if wrong.any():
            at = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise DataError(
                f"{self.name}: label {values[at]} of sample {at[0]} is outside the classes 0 to {classes - 1} "
                f"({int(wrong.sum())} of {values.size} labels are); the model's last layer has {classes} outputs"
            )


class BinaryCrossentropy(Loss):
    """``-(y_true * log(y_pred) + (1 - y_true) * log(1 - y_pred))``, the mean over the outputs of a sample.

    Args:
        from_logits: whether the model's output is to go through a sigmoid first.
    """

    name = "binary_crossentropy"

    def __init__(self, *, from_logits: bool = False) -> None:
        self.from_logits = from_logits

    def per_sample(self, y_true: Any, y_pred: Any) -> Any:
        """Return the loss of each sample."""
        y_true = _as(y_true, y_pred.shape, y_pred.dtype)
        logits = y_pred if self.from_logits else argument_of(y_pred, ops.sigmoid)
        if logits is not None:
            return _flat_mean(ops.sigmoid_cross_entropy(logits, y_true))
        return _flat_mean(-(y_true * _safe_log(y_pred) + (1 - y_true) * _safe_log(1 - y_pred)))

    def check(self, y_true: Array, output_shape: tuple[int | None, ...]) -> None:
        """Raise if shapes differ or a target is outside of 0 to 1."""
        super().check(y_true, output_shape)
        values = to_host(y_true)
        wrong = ~((values >= 0) & (values <= 1))
        if wrong.any():
            at = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise DataError(
                f"{self.name}: target {values[at]} of sample {at[0]} is outside of 0 to 1; for labels of several "
                "classes use loss='sparse_categorical_crossentropy'"
            )


class MeanSquaredError(Loss):
    """``(y_true - y_pred)**2``, the mean over the outputs of a sample."""

    name = "mean_squared_error"

    def per_sample(self, y_true: Any, y_pred: Any) -> Any:
        """Return the loss of each sample."""
        y_true = _as(y_true, y_pred.shape, y_pred.dtype)
        if y_pred.ndim == 1:
            y_pred, y_true = y_pred.reshape(-1, 1), ops.reshape(y_true, shape=(-1, 1))
        return _flat_mean(ops.mean_squared_error(y_pred, y_true))


class FunctionLoss(Loss):
    """A loss of the user's own: a function ``(y_true, y_pred) -> Tensor``, per sample or already a mean."""

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        self.function = function
        self.name = getattr(function, "__name__", "loss")

    def per_sample(self, y_true: Any, y_pred: Any) -> Any:
        """Return the loss of each sample; a mean counts for every sample."""
        value = self.function(y_true, y_pred)
        if not isinstance(value, Tensor):
            raise ConfigError(f"loss {self.name!r} must return a Tensor, not {type(value).__name__}")
        samples = y_pred.shape[0]
        if value.ndim and value.shape[0] != samples:
            raise ShapeError(
                f"loss {self.name!r} returned shape {value.shape} for {samples} samples; expected a value for each "
                "sample, or a scalar, their mean"
            )
        return ops.broadcast_to(value.reshape(1), shape=(samples,)) if value.ndim == 0 else _flat_mean(value)

    def check(self, y_true: Array, output_shape: tuple[int | None, ...]) -> None:
        """Accept all targets: only the function knows."""


_KNOWN: dict[str, type[Loss]] = {
    "binary_crossentropy": BinaryCrossentropy,
    "categorical_crossentropy": CategoricalCrossentropy,
    "mean_squared_error": MeanSquaredError,
    "mse": MeanSquaredError,
    "sparse_categorical_crossentropy": SparseCategoricalCrossentropy,
}


def get(loss: str | Loss | Callable[[Any, Any], Any]) -> Loss:
    """Return the loss of a name or function, or `loss` itself when it is one."""
    if isinstance(loss, Loss):
        return loss
    if callable(loss):
        return FunctionLoss(loss)
    if loss not in _KNOWN:
        raise unknown_name("loss", loss, _KNOWN)
    return _KNOWN[loss]()


def argument_of(y: Any, activation: Op[Any]) -> Any:
    """Return the Tensor that `activation` made `y` of; None if it did not, or nothing was recorded.

    A softmax along another axis than the last, on which the classes are, is another activation.
    """
    call = y.call
    if call is None or call.op is not activation or call.saved is None:
        return None
    if call.attributes.get("axis", -1) not in (-1, y.ndim - 1):
        return None
    return call.argument(0)


def _check_classes(name: str, output_shape: tuple[int | None, ...]) -> int:
    classes = output_shape[-1] if len(output_shape) > 1 else 1
    if classes is None or classes < 2:
        raise ShapeError(
            f"{name}: the model's output of shape {readable(output_shape)} has one value per sample, and one class is "
            "no choice; give the last layer an output for each class, or use loss='binary_crossentropy'"
        )
    return classes


def _as(y_true: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Return targets in the shape and dtype of predictions; by ops, so that a plan sees it."""
    y_true = y_true if y_true.shape == shape else ops.reshape(y_true, shape=shape)
    return y_true if y_true.dtype == dtype else ops.cast(y_true, dtype=dtype)


def _safe_log(probability: Any) -> Any:
    return ops.log(ops.clip(probability, low=EPSILON, high=1 - EPSILON))


def _flat_mean(values: Any) -> Any:
    """Return the mean over all axes but the first."""
    return values if values.ndim == 1 else values.mean(axis=tuple(range(1, values.ndim)))


def _without_trailing_one(shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
    return tuple(shape[:-1]) if shape and shape[-1] == 1 else tuple(shape)
