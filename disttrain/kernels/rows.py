"""Rows that are copied or added up by number, and sums of all rows: cpu/rows.cpp."""

import math
from typing import Any

import numpy as np

from disttrain.backend import Array
from disttrain.kernels.library import Launch, address, applies_to, native, new_array

_FEWEST = 1 << 12  # elements: below, NumPy's one call costs no more than preparing this one


def embedding(indices: Array, table: Array, *, out: Array | None = None) -> Launch | None:
    """Compute what the op `embedding` returns; None where it does not apply: see `disttrain.kernels`.

    The launch's function returns whether an index is wrong.
    """
    compute = native("take_rows")
    if compute is None or not _are_indices(indices) or not applies_to(table) or table.ndim != 2:
        return None
    out = new_array((*indices.shape, table.shape[1]), out)
    return Launch(compute, (indices.size, *table.shape, address(indices), address(table), address(out)), out)


def embedding_table(g: Array, indices: Array, *, rows: int, out: Array | None = None) -> Launch | None:
    """Compute what the op `_embedding_table` returns; None where it does not apply."""
    compute = native("add_rows")
    if compute is None or not _are_indices(indices) or not applies_to(g) or g.shape[:-1] != indices.shape:
        return None
    width = g.shape[-1]
    out = new_array((rows, width), out)
    return Launch(compute, (indices.size, rows, width, address(indices), address(g), address(out)), out)


def sum_to(x: Array, *, shape: tuple[int, ...], out: Array | None = None) -> Launch | None:
    """Compute what the op `sum_to` returns where it sums over the first axes; else None."""
    if type(x) is not np.ndarray or x.size < _FEWEST:
        return None
    compute = native("sum_rows")
    kept = len(shape)
    while kept and shape[len(shape) - kept] == 1:  # axes of length 1 in front are summed as absent ones are
        kept -= 1
    first = x.ndim - kept
    if compute is None or not applies_to(x) or first < 1 or x.shape[first:] != shape[len(shape) - kept :]:
        return None
    out = new_array(shape, out)
    return Launch(compute, (math.prod(x.shape[:first]), math.prod(x.shape[first:]), address(x), address(out)), out)


def _are_indices(indices: Any) -> bool:
    return (
        type(indices) is np.ndarray
        and indices.dtype == np.int64
        and indices.flags.c_contiguous
        and indices.flags.aligned
    )
