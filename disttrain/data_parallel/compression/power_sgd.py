"""Gradients of which a few rank-one matrices travel, with error feedback."""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from disttrain.comm import ring
from disttrain.comm.pending import Channel, HostArray, Steps
from disttrain.data_parallel.compression.compression import Carrier, Compression, Part
from disttrain.errors import ConfigError
from disttrain.kernels import low_rank

_DEPENDENT = 1e-6  # a column of which less than this is left, when the others are taken from it, has nothing new


@dataclass(frozen=True)
class PowerSGD(Compression):
    """The gradient M of a weight travels as ``P Q'``, of `rank` columns: one step of power iteration on the sum.

    A weight is a matrix of its last axis by all others; one without a second axis, and one that would not be shorter,
    travels as it is. What ``P Q'`` leaves out is added to the next step's gradient, and Q is where the next step
    begins. Moves ``2 (p-1)/p * rank * (rows + columns)`` elements per rank for a matrix, in two sums.

    Args:
        rank: number of columns, from 1.

    Source: Vogels, Karimireddy & Jaggi, "PowerSGD: practical low-rank gradient compression for distributed
    optimization", 2019.
    """

    rank: int = 2

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ConfigError: `rank` is none.
        """
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ConfigError(f"PowerSGD: rank must be an integer of at least 1, not {self.rank!r}")

    def carrier(self, parts: Sequence[Part], size: int, dtype: Any) -> Carrier:
        """Return a wire with memory, and a guess of Q for each matrix."""
        memory = np.zeros(size, dtype)
        guesses = {}
        for part in parts:
            if len(part.shape) > 1:
                generator = np.random.default_rng(zlib.crc32(part.name.encode()))  # the same on all ranks
                guesses[part.name] = generator.standard_normal((part.shape[-1], self.rank)).astype(dtype)
        return Carrier(wire=_LowRank(self.rank, parts, memory, guesses), memory=memory, guesses=guesses)


class _Matrix(NamedTuple):
    """Whole rows of a weight's gradient: where they lie, and Q."""

    place: slice
    rows: int
    guess: HostArray


class _LowRank:
    def __init__(self, rank: int, parts: Sequence[Part], memory: HostArray, guesses: dict[str, HostArray]) -> None:
        self._rank = rank
        self._parts = parts
        self._memory = memory
        self._guesses = guesses

    def all_reduce(self, flat: HostArray, channel: Channel, begin: int = 0) -> Steps:
        """Replace the matrices in `flat` by ``P Q'`` of their sums, and what lies beside them by its sum."""
        if channel.world_size == 1:
            return
        matrices, others = self._layout(begin, begin + flat.size)
        memory = self._memory[begin : begin + flat.size]
        with np.errstate(over="ignore", invalid="ignore"):  # it shows in the result, on all ranks
            flat += memory
            lent = channel.scratch.take(self._rank * sum(m.rows for m in matrices) + _length(others), flat.dtype)
            columns, beside = _split(lent, [m.rows for m in matrices], self._rank)
            for matrix, p in zip(matrices, columns, strict=True):
                np.matmul(flat[matrix.place].reshape(matrix.rows, -1), matrix.guess, out=p)
            _pack(flat, others, beside)
        yield from ring.all_reduce(lent, np.add, channel)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            widths = [len(matrix.guess) for matrix in matrices]
            sums = channel.scratch.take(self._rank * sum(widths), flat.dtype)
            for matrix, p, q in zip(matrices, columns, _split(sums, widths, self._rank)[0], strict=True):
                _orthogonalize(p)
                m = flat[matrix.place].reshape(matrix.rows, -1)
                np.matmul(m.T, p, out=q)
                _rest(m, p, np.ascontiguousarray(q.T), out=memory[matrix.place].reshape(m.shape))
        yield from ring.all_reduce(sums, np.add, channel)
        with np.errstate(over="ignore", invalid="ignore"):
            for matrix, p, q in zip(matrices, columns, _split(sums, widths, self._rank)[0], strict=True):
                _product(p, np.ascontiguousarray(q.T), out=flat[matrix.place].reshape(matrix.rows, -1))
                largest = np.abs(q).max(axis=0)
                # a column of zeros would stay so for ever; a length would overflow or vanish when it is squared
                np.divide(q, largest, out=matrix.guess, where=largest > 0)
            _unpack(beside, others, flat)
        channel.scratch.give(lent)
        channel.scratch.give(sums)

    def _layout(self, begin: int, end: int) -> tuple[list[_Matrix], list[slice]]:
        """Return what is to be approximated between two places of the bucket, and what lies beside it."""
        matrices, others = [], []
        for part in self._parts:
            start, stop = max(part.place.start, begin), min(part.place.stop, end)
            if start >= stop:
                continue
            width = part.shape[-1] if len(part.shape) > 1 else 1
            first = start + (part.place.start - start) % width
            rows = max(stop - first, 0) // width
            if part.name not in self._guesses or self._rank * (rows + width) >= rows * width:
                others.append(slice(start - begin, stop - begin))
                continue
            last = first + rows * width
            matrices.append(_Matrix(slice(first - begin, last - begin), rows, self._guesses[part.name]))
            rests = (slice(start - begin, first - begin), slice(last - begin, stop - begin))
            others += [rest for rest in rests if rest.start < rest.stop]
        return matrices, others


def _split(flat: HostArray, lengths: list[int], columns: int) -> tuple[list[HostArray], HostArray]:
    """Return matrices of `columns` columns that lie in `flat` end to end, and what is behind them."""
    matrices, end = [], 0
    for length in lengths:
        matrices.append(flat[end : end + length * columns].reshape(length, columns))
        end += length * columns
    return matrices, flat[end:]


def _length(places: list[slice]) -> int:
    return sum(place.stop - place.start for place in places)


def _packed(packed: HostArray, places: list[slice]) -> Iterator[tuple[slice, HostArray]]:
    end = 0
    for place in places:
        begin, end = end, end + place.stop - place.start
        yield place, packed[begin:end]


def _pack(flat: HostArray, places: list[slice], packed: HostArray) -> None:
    for place, part in _packed(packed, places):
        part[...] = flat[place]


def _unpack(packed: HostArray, places: list[slice], flat: HostArray) -> None:
    for place, part in _packed(packed, places):
        flat[place] = part


def _orthogonalize(p: HostArray) -> None:
    """Make the columns of `p` orthonormal, in place, by Gram and Schmidt; what depends on the others becomes 0.

    By elementwise operations and NumPy's sums, whose order is fixed: hosts with different BLAS get the same bits.
    """
    for i in range(p.shape[1]):
        column = p[:, i]
        before = np.sqrt(np.sum(column * column))
        for j in range(i):
            column -= np.sum(column * p[:, j]) * p[:, j]
        length = np.sqrt(np.sum(column * column))
        if length <= _DEPENDENT * before:
            column[...] = 0
        else:
            column /= length


def _product(p: HostArray, q: HostArray, out: HostArray) -> None:
    """Write ``p q`` to `out`: term by term, so that all ranks round alike."""
    if low_rank.product(p, q, out):
        return
    np.multiply(p[:, 0, None], q[0], out=out)
    for i in range(1, len(q)):
        out += p[:, i, None] * q[i]


def _rest(m: HostArray, p: HostArray, q: HostArray, out: HostArray) -> None:
    """Write ``m - p q`` to `out`."""
    if low_rank.rest(m, p, q, out):
        return
    _product(p, q, out)
    np.subtract(m, out, out=out)
