"""What layers with a moving window share: sizes, strides and padding as Keras writes them."""

from collections.abc import Sequence

import numpy as np

from disttrain.autodiff.ops.conv import Padding, Pair, same_padding
from disttrain.errors import ConfigError, ShapeError, unknown_name
from disttrain.layers.layer import Layer


def pair(what: str, value: int | Sequence[int]) -> Pair:
    """Return `value` for height and width: one number counts for both."""
    numbers = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(numbers) != 2 or not all(isinstance(n, int | np.integer) and n >= 1 for n in numbers):
        raise ConfigError(f"{what} is a number or a pair of numbers of at least 1, not {value!r}")
    return int(numbers[0]), int(numbers[1])


def padding_for(padding: str, size: Sequence[int], window: Pair, strides: Pair) -> Padding:
    """Return the padding that the name ``"valid"`` or ``"same"`` means for images of `size`."""
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding == "same":
        return same_padding((size[0], size[1]), window, strides)
    raise unknown_name("padding", padding, ("same", "valid"))


def check_fits(layer: Layer, shape: Sequence[int], output: Pair) -> None:
    """Raise ShapeError if the layer's window is larger than the image."""
    if min(output) < 1:
        raise ShapeError(
            f"layer {layer.path!r} ({type(layer).__name__}): its window does not fit into an image of "
            f'{shape[1]} x {shape[2]}; use a smaller window or padding="same"'
        )
