"""Masking: leaves out the steps of a sequence that hold nothing."""

from typing import Any

from disttrain.autodiff import ops
from disttrain.autodiff.ops import elementwise
from disttrain.layers.layer import Layer


class Masking(Layer):
    """Makes a mask that leaves out each step all of whose numbers are `mask_value`, and sets those to 0.

    Shape: ``(samples, steps, ...)``, as the input. What follows has the mask: see `Layer.compute_mask`.

    Args:
        mask_value: of the steps to leave out.
        **kwargs: of every `Layer`.
    """

    min_ndim = 3

    def __init__(self, mask_value: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mask_value = mask_value

    def call(self, x: Any) -> Any:
        """Return `x`, with 0 where steps are left out."""
        mask = self.compute_mask(x)
        return ops.where(ops.reshape(mask, shape=(*mask.shape, *[1] * (x.ndim - 2))), x, 0.0)

    def compute_mask(self, x: Any, mask: Any = None) -> Any:
        """Return which steps count, ``(samples, steps)``."""
        differs = ops.cast(elementwise.not_equal(x, self.mask_value), dtype="float32")
        return elementwise.greater(ops.max(differs, axis=tuple(range(2, x.ndim))), 0)
