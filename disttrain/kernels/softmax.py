"""Softmax along the last axis, losses made of it, and their gradients: cpu/softmax.cpp."""

import ctypes
import math
from typing import Any

import numpy as np

from disttrain.backend import Array
from disttrain.kernels.library import Launch, address, applies_to, native, new_array


class _Spread(ctypes.Structure):
    """As in cpu/softmax.cpp."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("inner", "outer_step", "inner_step"))


def softmax(x: Array, *, axis: int = -1, out: Array | None = None) -> Launch | None:
    """Compute what the op `softmax` returns; None where it does not apply: see `disttrain.kernels`."""
    return _along_rows("softmax", x, axis=axis, out=out)


def softmax_gradient(g: Array, y: Array, *, axis: int = -1, out: Array | None = None) -> Launch | None:
    """Compute the gradient of `softmax`, of its output `y`; None where it does not apply."""
    return _along_rows("softmax_gradient", g, y, axis=axis, out=out)


def log_softmax(x: Array, *, axis: int = -1, out: Array | None = None) -> Launch | None:
    """Compute what the op `log_softmax` returns; None where it does not apply."""
    return _along_rows("log_softmax", x, axis=axis, out=out)


def log_softmax_gradient(g: Array, y: Array, *, axis: int = -1, out: Array | None = None) -> Launch | None:
    """Compute the gradient of `log_softmax`, of its output `y`; None where it does not apply."""
    return _along_rows("log_softmax_gradient", g, y, axis=axis, out=out)


def softmax_cross_entropy(logits: Array, targets: Array, *, out: Array | None = None) -> Launch | None:
    """Compute what `softmax_cross_entropy` returns; None where it does not apply."""
    return _losses("softmax_cross_entropy", logits, targets, out) if _are_targets(targets, logits) else None


def softmax_cross_entropy_gradient(
    g: Array, _y: Array, logits: Array, targets: Array, *, out: Array | None = None
) -> Launch | None:
    """Compute the gradient of `softmax_cross_entropy` in `logits`; None where it does not apply."""
    return (
        _gradient("softmax_cross_entropy_gradient", g, logits, targets, out) if _are_targets(targets, logits) else None
    )


def sparse_softmax_cross_entropy(logits: Array, labels: Array, *, out: Array | None = None) -> Launch | None:
    """Compute what `sparse_softmax_cross_entropy` returns; None where it does not apply."""
    return _losses("sparse_softmax_cross_entropy", logits, labels, out) if _are_labels(labels, logits) else None


def sparse_softmax_cross_entropy_gradient(
    g: Array, _y: Array, logits: Array, labels: Array, *, out: Array | None = None
) -> Launch | None:
    """Compute the gradient of `sparse_softmax_cross_entropy` in `logits`; None where it does not apply."""
    name = "sparse_softmax_cross_entropy_gradient"
    return _gradient(name, g, logits, labels, out) if _are_labels(labels, logits) else None


def _along_rows(name: str, *arrays: Array, axis: int, out: Array | None) -> Launch | None:
    compute, like = native(name), arrays[-1]
    if compute is None or not applies_to(*arrays) or arrays[0].shape != like.shape or not _has_rows(like, axis):
        return None
    out = new_array(like.shape, out)
    return Launch(compute, (*_rows(like), *map(address, arrays), address(out)), out)


def _losses(name: str, logits: Array, targets: Array, out: Array | None) -> Launch | None:
    compute = native(name)
    if compute is None:
        return None
    out = new_array(logits.shape[:-1], out)
    return Launch(compute, (*_rows(logits), address(logits), address(targets), address(out)), out)


def _gradient(name: str, g: Array, logits: Array, targets: Array, out: Array | None) -> Launch | None:
    compute = native(name)
    spread = _spread(g, logits.shape[:-1])
    if compute is None or spread is None:
        return None
    out = new_array(logits.shape, out)
    args = (*_rows(logits), ctypes.byref(spread), address(g), address(logits), address(targets), address(out))
    return Launch(compute, args, out)


def _are_targets(targets: Array, logits: Array) -> bool:
    return applies_to(logits, targets) and _has_rows(logits) and targets.shape == logits.shape


def _are_labels(labels: Array, logits: Array) -> bool:
    return (
        applies_to(logits)
        and _has_rows(logits)
        and type(labels) is np.ndarray
        and labels.dtype == np.int64
        and labels.shape == logits.shape[:-1]
        and labels.flags.c_contiguous
        and labels.flags.aligned
    )


def _has_rows(x: Array, axis: int = -1) -> bool:
    """Return whether `axis` is the last of `x`, and there is something along it: else the definition says what is."""
    return x.ndim > 0 and x.shape[-1] > 0 and axis in (-1, x.ndim - 1)


def _rows(x: Array) -> tuple[int, int]:
    return math.prod(x.shape[:-1]), x.shape[-1]


def _spread(g: Array, shape: tuple[int, ...]) -> Any:
    """Return how the values of `g` lie, None where no kernel reads them: that of a mean is one value, broadcast."""
    if type(g) is not np.ndarray or g.dtype != np.float32 or g.shape != shape or not g.flags.aligned:
        return None
    if g.flags.c_contiguous:
        return _Spread(max(g.size, 1), 0, 1)
    if g.ndim > 2 or any(step % 4 for step in g.strides):
        return None
    outer, inner = (0, *g.strides)[-2:]
    return _Spread(shape[-1], outer // 4, inner // 4)
