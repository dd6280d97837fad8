"""What a message can carry: plain values in host memory, in the order of their indices."""

from typing import Any

import numpy as np

from disttrain.backend import Array, get_array_module, to_host
from disttrain.comm.pending import HostArray
from disttrain.errors import ConfigError, ShapeError, unknown_name

ALIGNMENT = 64  # bytes: a cache line, and the widest vector register

_OPS = {"sum": np.add, "max": np.maximum, "min": np.minimum}


def aligned_zeros(size: int, dtype: np.dtype[Any]) -> HostArray:
    """Return zeros, shape ``(size,)``, that begin at a multiple of 64 bytes."""
    raw = np.zeros(size * dtype.itemsize + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size * dtype.itemsize].view(dtype)


def contiguous(array: Array) -> HostArray:
    """Return `array` as a C-contiguous NumPy array: itself when it is one, else a copy.

    Raises:
        ShapeError: its elements are Python objects, which only pickle could send.
    """
    host = to_host(array)
    if host.dtype.hasobject:
        raise ShapeError(f"expected an array of numbers, not of Python objects ({host.dtype})")
    if host.flags.c_contiguous:
        return host
    return np.ascontiguousarray(host).reshape(host.shape)


def copy_back(host: HostArray, array: Array) -> None:
    """Write `host` into `array`, unless `contiguous` made no copy of it."""
    if host is not array and (not isinstance(array, np.ndarray) or not np.may_share_memory(host, array)):
        array[...] = get_array_module(array).asarray(host)


def check_writable(array: Array) -> None:
    """Refuse what cannot receive a result in place, before any message is sent.

    Raises:
        ShapeError: `array` is a number, a list or a read-only array.
    """
    if get_array_module(array) is not np:
        return
    if not isinstance(array, np.ndarray):
        raise ShapeError(f"the result is written in place: expected an array, not {type(array).__name__}")
    if not array.flags.writeable:
        raise ShapeError("the result is written in place, and this array is read-only: pass a copy")


def check_flat(array: Array) -> None:
    """Refuse what cannot be filled in place, chunk by chunk.

    Raises:
        ShapeError: `array` is not a flat, writable NumPy array without gaps.
    """
    check_writable(array)
    if not isinstance(array, np.ndarray) or array.ndim != 1 or not array.flags.c_contiguous:
        raise ShapeError(f"expected a flat NumPy array without gaps, not {type(array).__name__} {np.shape(array)}")


def combination(op: str, array: Array) -> np.ufunc:
    """Return the function of two arrays that `op` names.

    Raises:
        ConfigError: `op` is unknown, or is a sum of truths.
    """
    if op not in _OPS:
        raise unknown_name("op", op, _OPS)
    if op == "sum" and getattr(array, "dtype", None) == np.bool_:
        raise ConfigError("a sum of bool counts nothing: use op 'max' for any, 'min' for all, or integers")
    return _OPS[op]
