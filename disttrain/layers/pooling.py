"""Pooling layers, channels last."""

from collections.abc import Sequence
from typing import Any

from disttrain.autodiff import ops
from disttrain.autodiff.ops.conv import output_size
from disttrain.layers.layer import Layer
from disttrain.layers.window import check_fits, padding_for, pair


class _Pooling2D(Layer):
    """Base of the layers that reduce windows. Shape: ``(samples, h, w, c) -> (samples, oh, ow, c)``.

    Args:
        pool_size: height and width of the window; one number for both.
        strides: steps of the window; by default its size, so that windows touch.
        padding: ``"valid"``, only whole windows; ``"same"``, ``oh = ceil(h / stride)``.
        **kwargs: of every `Layer`.
    """

    ndim = 4
    _op: Any = None

    def __init__(
        self,
        pool_size: int | Sequence[int] = (2, 2),
        strides: int | Sequence[int] | None = None,
        padding: str = "valid",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        name = type(self).__name__
        self.pool_size = pair(f"{name}: pool_size", pool_size)
        self.strides = self.pool_size if strides is None else pair(f"{name}: strides", strides)
        self.padding = padding
        padding_for(padding, (1, 1), self.pool_size, self.strides)  # an unknown name is an error here

    def call(self, x: Any) -> Any:
        """Return the pooled input."""
        padding = padding_for(self.padding, x.shape[1:3], self.pool_size, self.strides)
        check_fits(self, x.shape, output_size(x.shape[1:3], self.pool_size, self.strides, padding))
        return type(self)._op(x, size=self.pool_size, strides=self.strides, padding=padding)


class MaxPooling2D(_Pooling2D):
    """Returns the maximum of each window; arguments and shapes as in every pooling layer."""

    _op = ops.max_pool2d


class AveragePooling2D(_Pooling2D):
    """Returns the mean of each window, over the elements that are not padding; arguments as in MaxPooling2D."""

    _op = ops.average_pool2d


class GlobalAveragePooling2D(Layer):
    """Returns the mean of each channel. Shape: ``(samples, h, w, c) -> (samples, c)``."""

    ndim = 4

    def call(self, x: Any) -> Any:
        """Return the means."""
        return x.mean(axis=(1, 2))
