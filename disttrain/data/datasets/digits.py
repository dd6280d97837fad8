"""Optical digits: 1,797 grey images of handwritten digits, 8x8, in 10 classes; part of disttrain.

Source: Alpaydin & Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, 1998, https://doi.org/10.24432/C50P49; its test part, which scikit-learn's `load_digits`
carries.
"""

from importlib import resources
from typing import Any

import numpy as np

LICENSE = (
    "CC BY 4.0; E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, "
    "UCI Machine Learning Repository, 1998, https://doi.org/10.24432/C50P49"
)
PACKAGE = None
CLASSES = tuple("0123456789")

_TRAIN_SIZE = 1437

_Pair = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


def load_data() -> tuple[_Pair, _Pair]:
    """Return ``(x_train, y_train), (x_test, y_test)``: the first 1,437 samples and the last 360.

    Images are uint8 from 0 to 16 (dark pixels in a cell of 4x4), shape ``(n, 8, 8)``; labels are
    uint8 from 0 to 9, shape ``(n,)``. The samples stand as in the source, and its last ones are harder
    than a random draw: where logistic regression has 95 % on such a draw it has 90 % on them.
    """
    text = resources.files(__package__).joinpath("digits.txt").read_text(encoding="ascii")
    lines = [line.encode() for line in text.splitlines() if not line.startswith("#")]
    # 64 pixels in base 17, a space, the label; "a" follows "9" in value, but not in ASCII.
    codes = np.frombuffer(b"".join(lines), np.uint8).reshape(len(lines), 66)
    values = np.where(codes >= ord("a"), codes - (ord("a") - 10), codes - ord("0")).astype(np.uint8)
    x, y = values[:, :64].reshape(-1, 8, 8), values[:, 65].copy()
    return (x[:_TRAIN_SIZE], y[:_TRAIN_SIZE]), (x[_TRAIN_SIZE:], y[_TRAIN_SIZE:])
