"""All-reduce in memory that the ranks of a node share: cpu/all_reduce.cpp."""

import ctypes
from typing import Any

from disttrain.kernels.library import native

WAITS, DONE, ELSEWHERE, DIFFERS = range(4)
_SLOTS = 8

_Numbers = ctypes.POINTER(ctypes.c_int64)


class Ranks(ctypes.Structure):
    """`Node` of the C++ source: the ranks of a node, as one of them sees them.

    `others` is a digest of the collectives that this rank has begun without this memory.
    """

    _fields_ = (
        ("rank", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("next", ctypes.c_int64),
        ("others", ctypes.c_int64),
        ("spins", ctypes.c_int64),
        ("windows", ctypes.c_int64),
        ("slots", _Numbers),
        ("segments", _Numbers),
        ("lengths", _Numbers),
        ("arrays", _Numbers),
        ("settled", ctypes.c_int64),
        ("freed_by", ctypes.c_int64 * _SLOTS),
    )


class Collective(ctypes.Structure):
    """One all-reduce; `ranks` is to be set, and `limit_ns`: how long its start may wait."""

    _fields_ = (
        ("ranks", ctypes.POINTER(Ranks)),
        ("limit_ns", ctypes.c_int64),
        ("number", ctypes.c_int64),
        ("what", ctypes.c_int64),
        ("others", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("kind", ctypes.c_int64),
        ("data", ctypes.c_void_p),
        ("phase", ctypes.c_int64),
        ("ready", ctypes.c_int64),
        ("waited_ns", ctypes.c_int64),
        ("first", ctypes.c_int64),
    )


def slots_bytes() -> int | None:
    """Return the bytes in which each rank announces its arrays; None where there are no kernels."""
    size = native("slots_bytes")
    return None if size is None else int(size())


def announced(collective: Collective, rank: int) -> int:
    """Return `what` as `rank` has announced it, where ranks differ."""
    out = ctypes.c_int64()
    native("announced")(ctypes.addressof(collective), rank, ctypes.addressof(out))
    return out.value


def functions() -> tuple[Any, Any]:
    """Return the functions that start an all-reduce and continue it: they take addresses."""
    return native("start_all_reduce"), native("continue_all_reduce")
