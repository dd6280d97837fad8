"""What tests of convolutions convolve."""

import numpy as np

UNIT = 2.0**-24  # of rounding to float32


def numbers(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)


def arguments(shape):
    """Return x, kernel and cotangent, and for each op its name, arguments, attributes and terms of a sum."""
    window = {"strides": shape.strides, "padding": shape.padding}
    x = numbers(shape.images, *shape.size, shape.channels)
    kernel = numbers(*shape.window, shape.channels, shape.filters)
    g = numbers(shape.images, *shape.out, shape.filters)
    area = shape.window[0] * shape.window[1]
    return [
        ("conv2d", (x, kernel), window, area * shape.channels),
        ("conv2d_input", (g, kernel), {"size": shape.size, **window}, area * shape.filters),
        ("conv2d_kernel", (x, g), {"size": shape.window, **window}, shape.images * shape.out[0] * shape.out[1]),
    ]
