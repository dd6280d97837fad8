"""The slow, obvious versions of the windowed ops: loops over single numbers, the oracle of the fast ones."""

import numpy as np

VALID = ((0, 0), (0, 0))


def output_length(length, window, stride, before, after):
    return len(range(0, length + before + after - window + 1, stride))


def conv2d(x, kernel, strides, padding):
    (top, bottom), (left, right) = padding
    samples, height, width, channels = x.shape
    kh, kw, _, filters = kernel.shape
    oh = output_length(height, kh, strides[0], top, bottom)
    ow = output_length(width, kw, strides[1], left, right)
    y = np.zeros((samples, oh, ow, filters))
    for n in range(samples):
        for i in range(oh):
            for j in range(ow):
                for f in range(filters):
                    for a in range(kh):
                        for b in range(kw):
                            row, column = i * strides[0] + a - top, j * strides[1] + b - left
                            if 0 <= row < height and 0 <= column < width:
                                for c in range(channels):
                                    y[n, i, j, f] += x[n, row, column, c] * kernel[a, b, c, f]
    return y


def pool2d(x, size, strides, padding, reduce):
    """Return `reduce` of the list of values in each window that are not padding."""
    (top, bottom), (left, right) = padding
    samples, height, width, channels = x.shape
    oh = output_length(height, size[0], strides[0], top, bottom)
    ow = output_length(width, size[1], strides[1], left, right)
    y = np.zeros((samples, oh, ow, channels))
    for n, i, j, c in np.ndindex(y.shape):
        rows = [r for a in range(size[0]) if 0 <= (r := i * strides[0] + a - top) < height]
        columns = [q for b in range(size[1]) if 0 <= (q := j * strides[1] + b - left) < width]
        y[n, i, j, c] = reduce([x[n, r, q, c] for r in rows for q in columns])
    return y


def softmax(x, axis=-1):
    y = np.empty_like(x)
    for row, out in zip(np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis]), _rows_of(y, axis), strict=True):
        weights = [np.exp(value) for value in row]
        out[...] = [weight / sum(weights) for weight in weights]
    return y


def _rows_of(y, axis):
    moved = np.moveaxis(y, axis, -1)
    return [moved[at] for at in np.ndindex(moved.shape[:-1])]
