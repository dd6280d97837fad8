"""Layers that change the shape only."""

import math
from typing import Any

from disttrain.layers.layer import Layer


class Flatten(Layer):
    """Returns each sample as a vector. Shape: ``(samples, a, b, ...) -> (samples, a * b * ...)``."""

    autocast = False

    def call(self, x: Any) -> Any:
        """Return the reshaped input."""
        return x.reshape(x.shape[0], math.prod(x.shape[1:]))
