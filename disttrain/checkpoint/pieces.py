"""Pieces: how the tensors of a checkpoint are shared out among the ranks that write it, and copied for it.

All ranks hold all tensors. They are thought of as one flat row, of which each rank writes an equal part: whole tensors,
and pieces of those that lie across a border. How many ranks there were matters to nobody who reads it.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from disttrain.backend import Array, to_host


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A tensor, or a part of one.

    Attributes:
        array: the whole tensor, or a flat part of it.
        of: the shape of the whole, None where `array` is that.
        start: place of its first element in the flat whole.
    """

    array: Array
    of: tuple[int, ...] | None = None
    start: int = 0

    def description(self) -> dict[str, Any]:
        """Return dtype and shape, and of what it is a piece, as JSON values."""
        whole = {"dtype": str(self.array.dtype), "shape": list(self.array.shape)}
        return whole if self.of is None else {**whole, "of": list(self.of), "start": self.start}


Pieces = dict[str, dict[str, Piece]]  # by group and by name


def share(tensors: Mapping[str, Mapping[str, Array]], rank: int, world_size: int) -> Pieces:
    """Return what `rank` writes of `tensors`, arrays by group and name; views of them."""
    pieces: Pieces = {group: {} for group in tensors} if rank == 0 else {}  # a group without tensors is one as well
    every = [(group, name, array) for group, arrays in tensors.items() for name, array in arrays.items()]
    ends = list(itertools.accumulate(array.nbytes for _, _, array in every))
    total = ends[-1] if ends else 0
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    for (group, name, array), end in zip(every, ends, strict=True):
        begin = end - array.nbytes
        if array.size == 0:
            if rank == 0:
                pieces[group][name] = Piece(array=array)
            continue
        # an element belongs to the rank in whose part it begins
        start, stop = (-(-min(max(at - begin, 0), array.nbytes) // array.itemsize) for at in (first, last))
        if (start, stop) == (0, array.size):
            pieces.setdefault(group, {})[name] = Piece(array=array)
        elif start < stop:
            piece = Piece(array=array.reshape(-1)[start:stop], of=tuple(array.shape), start=start)
            pieces.setdefault(group, {})[name] = piece
    return pieces


class Snapshot:
    """Copies of pieces, in memory that is used again for the next ones."""

    def __init__(self) -> None:
        self._memory: dict[tuple[str, str], np.ndarray[Any, Any]] = {}

    def take(self, pieces: Pieces) -> Pieces:
        """Return copies of `pieces` in host memory; those of the last call are overwritten."""
        before, self._memory = self._memory, {}
        copies: Pieces = {group: {} for group in pieces}
        for group, name, piece in _flat(pieces):
            memory = before.pop((group, name), None)
            if memory is None or memory.shape != piece.array.shape or memory.dtype != piece.array.dtype:
                memory = np.empty(piece.array.shape, piece.array.dtype)
            np.copyto(memory, to_host(piece.array))
            self._memory[group, name] = memory
            copies[group][name] = Piece(array=memory, of=piece.of, start=piece.start)
        return copies


def _flat(pieces: Pieces) -> Iterator[tuple[str, str, Piece]]:
    for group, held in pieces.items():
        for name, piece in held.items():
            yield group, name, piece
