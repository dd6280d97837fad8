"""Matrix products, whatever way their operands lie, with what follows one: cpu/matmul.cpp."""

import ctypes
import functools

import numpy as np

from disttrain.backend import Array
from disttrain.kernels.library import Launch, address, applies_to, native, new_array
from disttrain.kernels.precision import PRECISIONS, get_matmul_precision

_AXES = 4  # of a batch, after those are joined that lie together
_ITEM = 4  # bytes of a float

_Integers = tuple[int, ...]
_Axes = ctypes.c_int64 * _AXES


class _Products(ctypes.Structure):
    """As in cpu/matmul.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("m", "n", "k", "a_row", "a_column", "b_row", "b_column")),
        *((name, ctypes.c_int64) for name in ("relu", "precision")),
        *((name, _Axes) for name in ("counts", "a_steps", "b_steps")),
    )


def matmul(a: Array, b: Array, *, out: Array | None = None) -> Launch | None:
    """Compute what the op `_matmul` returns; None where it does not apply: see `disttrain.kernels`."""
    return _launch(a, b, None, relu=False, out=out)


def dense(
    x: Array, kernel: Array, bias: Array | None, *, activation: str | None = None, out: Array | None = None
) -> Launch | None:
    """Compute what the op `dense` returns; None where it does not apply: see `disttrain.kernels`."""
    if activation not in (None, "relu") or (
        bias is not None and (not applies_to(bias) or bias.shape != kernel.shape[1:])
    ):
        return None
    return _launch(x, kernel, bias, relu=activation == "relu", out=out)


def _launch(a: Array, b: Array, bias: Array | None, *, relu: bool, out: Array | None) -> Launch | None:
    compute = native("matmul")
    if compute is None or not _is_readable(a) or not _is_readable(b):
        return None
    precision = PRECISIONS.index(get_matmul_precision())
    described = _described(a.shape, a.strides, b.shape, b.strides, relu, precision)
    if described is None:
        return None
    products, shape = described
    c = new_array(shape, out)
    bias_at = None if bias is None else address(bias)
    return Launch(compute, (ctypes.byref(products), address(a), address(b), bias_at, address(c)), c)


def _is_readable(a: Array) -> bool:
    """Return whether the kernel can read `a`: of NumPy, float32, a matrix or a batch of them, however they lie."""
    return type(a) is np.ndarray and a.dtype == np.float32 and a.ndim > 1 and a.flags.aligned


@functools.lru_cache(maxsize=1024)
def _described(
    a: _Integers, a_strides: _Integers, b: _Integers, b_strides: _Integers, relu: bool, precision: int
) -> tuple[_Products, _Integers] | None:
    """Return how products lie and the shape of their results; None where there is no kernel for them.

    Args:
        a: a shape.
        a_strides: in bytes.
        b: a shape.
        b_strides: in bytes.
        relu: whether negative results become 0.
        precision: the number of one.
    """
    (m, k), n = a[-2:], b[-1]
    try:
        batch = np.broadcast_shapes(a[:-2], b[:-2])
    except ValueError:
        return None
    if b[-2] != k or any(stride % _ITEM for stride in (*a_strides, *b_strides)):
        return None
    (*a_steps, a_row, a_column), (*b_steps, b_row, b_column) = _steps(a, a_strides, batch), _steps(b, b_strides, batch)
    axes: list[tuple[int, int, int]] = []
    for count, *steps in zip(batch, a_steps, b_steps, strict=True):
        if count == 1:
            continue
        if axes and axes[-1][1:] == (steps[0] * count, steps[1] * count):  # together with the axis before
            count *= axes.pop()[0]
        axes.append((count, *steps))
    if axes and axes[-1][2] == 0 and (axes[-1][1] == a_row * m or m == 1):  # one product of all their rows
        count, step, _ = axes.pop()
        m, a_row = m * count, step if m == 1 else a_row
    if len(axes) > _AXES:
        return None
    lengths = zip(*axes, *[(1, 0, 0)] * (_AXES - len(axes)), strict=True)
    products = _Products(
        m, n, k, a_row, a_column, b_row, b_column, relu, precision, *(_Axes(*each) for each in lengths)
    )
    return products, (*batch, a[-2], n)


def _steps(shape: _Integers, strides: _Integers, batch: _Integers) -> list[int]:
    """Return distances in floats along the axes of `batch`, 0 where all share one matrix, and of rows and columns."""
    steps = [stride // _ITEM for stride in strides]
    of_batch = [0 if length == 1 else step for length, step in zip(shape[:-2], steps, strict=False)]
    of_matrix = [1 if length == 1 else step for length, step in zip(shape[-2:], steps[-2:], strict=True)]
    return [0] * (len(batch) - len(of_batch)) + of_batch + of_matrix
