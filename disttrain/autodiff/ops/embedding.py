"""Rows of a table by number, and the adjoint: each is the gradient of the other."""

from functools import partial
from typing import Any

import numpy as np

from disttrain.autodiff.joining import each, nowhere
from disttrain.autodiff.op import op
from disttrain.backend import Array, get_array_module, to_host
from disttrain.errors import DataError
from disttrain.kernels import rows as kernels
from disttrain.kernels.library import Launch


@op
def embedding(indices: Array, table: Array, *, name: str = "embedding") -> Array:
    """Return the rows of `table` that `indices` name.

    Shapes: ``(...), (rows, width) -> (..., width)``.

    Args:
        indices: whole numbers from 0 to below the number of rows, of any real dtype.
        table: of floats.
        name: how an error calls the place.

    Raises:
        DataError: an index that is not one of the rows', with its sample.
    """
    xp = get_array_module(table)
    _check(xp, indices, table.shape[0], name)
    return xp.take(table, _integers(xp, indices), 0)


@embedding.kernel
def _(indices: Array, table: Array, *, name: str = "embedding", out: Array | None = None) -> Launch | None:
    launch = kernels.embedding(indices, table, out=out)
    return launch and launch._replace(function=partial(_checked, launch.function, indices, table.shape[0], name))


@embedding.vjp
def _(g: Array, _y: Array, indices: Array, _table: Array, *, name: str = "embedding") -> tuple[Array, ...]:
    return None, _embedding_table(g, indices, rows=_table.shape[0])


@op
def _embedding_table(g: Array, indices: Array, *, rows: int) -> Array:
    """Return the adjoint of `embedding` in its table: `g` added up by row, for `indices` that `embedding` has checked.

    Shapes: ``(..., width), (...) -> (rows, width)``.
    """
    xp = get_array_module(g)
    width = g.shape[-1]
    table = xp.zeros(rows * width, g.dtype)
    # element by element, for which NumPy's `add.at` has a fast way: by rows it takes two to five times as long
    first = _integers(xp, indices).reshape(-1, 1) * width
    xp.add.at(table, (first + xp.arange(width)).reshape(-1), g.reshape(-1))
    return table.reshape(rows, width)


@_embedding_table.kernel
def _(g: Array, indices: Array, *, rows: int, out: Array | None = None) -> Launch | None:
    launch = kernels.embedding_table(g, indices, rows=rows, out=out)
    return launch and launch._replace(function=partial(_checked, launch.function, indices, rows, "embedding"))


@_embedding_table.vjp
def _(h: Array, _y: Array, _g: Array, indices: Array, *, rows: int) -> tuple[Array, ...]:
    return embedding(indices, h), None


embedding.joined = each(0)
_embedding_table.joined = nowhere


def _checked(compute: Any, indices: Array, rows: int, name: str, *args: Any) -> None:
    if compute(*args):
        _check(np, indices, rows, name)


def _integers(xp: Any, indices: Array) -> Array:
    return xp.asarray(indices).astype("int64", copy=False)


def _check(xp: Any, indices: Array, rows: int, name: str) -> None:
    given = xp.asarray(indices)
    if given.dtype.kind in "biu":  # of which two numbers tell all
        if not given.size or (given.min() >= 0 and given.max() < rows):
            return
        wrong = (given < 0) | (given >= rows)
    else:
        wrong = ~((given >= 0) & (given < rows) & (given == xp.floor(given)))
    where = to_host(wrong).nonzero()
    if where[0].size:
        at = tuple(int(i[0]) for i in where)
        place = f" of sample {at[0]}" if at else ""
        raise DataError(
            f"{name}: index {given[at]}{place} is none of the rows 0 to {rows - 1} ({where[0].size} of {given.size} "
            "indices are none); indices are whole numbers from 0 to below the number of rows"
        )
