"""Dropout, keyed by the sample's place in the global batch."""

from typing import Any

from disttrain.autodiff.ops.random import mask_like
from disttrain.backend import sample_bits, seed
from disttrain.errors import ConfigError
from disttrain.layers.layer import Layer
from disttrain.layers.step import current_step


class Dropout(Layer):
    """Sets a share of the elements to 0 while training, and divides the others by what is left.

    The mask follows from the seed, the layer's path, the step and each sample's place in the global batch, so
    it is the same on any number of workers.

    Args:
        rate: the share, from 0 to below 1.
        **kwargs: of every `Layer`.
    """

    supports_masking = True

    def __init__(self, rate: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 <= rate < 1:
            raise ConfigError(f"Dropout: rate must be from 0 to below 1, not {rate}")
        self.rate = rate

    def call(self, x: Any, training: bool = False) -> Any:
        """Return `x`, masked if `training`."""
        if not training or self.rate == 0:
            return x
        return x * self.mask(x)

    def mask(self, like: Any) -> Any:
        """Return what an array of the shape and dtype of `like`, ``(samples, ...)``, is multiplied by in training."""
        return mask_like(like, rate=self.rate, draw=self._bits)

    def _bits(self, *, samples: int, per_sample: int) -> Any:
        step = current_step()
        key = (seed(), "dropout", self.path, step.number)
        return sample_bits(*key, first=step.first, samples=samples, per_sample=per_sample)
