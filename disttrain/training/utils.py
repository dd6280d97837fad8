"""`dt.utils`, as Keras has it: the seed, one-hot targets, the digest of a model."""

from typing import Any

import numpy as np

from disttrain.backend import floatx, set_random_seed
from disttrain.checkpoint import digest
from disttrain.errors import DataError
from disttrain.layers import Layer

__all__ = ["set_random_seed", "state_digest", "to_categorical"]


def to_categorical(x: Any, num_classes: int | None = None) -> np.ndarray[Any, Any]:
    """Return integer labels as one-hot vectors.

    Args:
        x: labels from 0, shape ``(...)``.
        num_classes: length of the vectors; by default one more than the largest label.

    Returns:
        Zeros and ones of dtype `floatx()`, shape ``(..., num_classes)``.

    Raises:
        DataError: a label is negative, or not below `num_classes`.
    """
    labels = np.asarray(x).astype(np.int64)
    classes = int(labels.max(initial=-1)) + 1 if num_classes is None else num_classes
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        raise DataError(f"label {labels[wrong][0]} is outside the classes 0 to {classes - 1}")
    return np.asarray(labels[..., None] == np.arange(classes), dtype=floatx())


def state_digest(model: Layer) -> str:
    """Return the SHA-256 of all weights of `model` in order of their names: equal when all bits are."""
    return digest({weight.name: weight.data for weight in model.weights})
