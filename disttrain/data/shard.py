"""Who reads what: pure arithmetic on sample indices, the same answer for anybody who asks.

The order of an epoch is a bijection that is computed and not stored, so that any step of any epoch
can be had at once, on any number of ranks.
"""

import functools
import math
import operator
from typing import Any

import numpy as np

from disttrain.backend import Array, philox
from disttrain.errors import ConfigError

MAX_LENGTH = 2**40
_ROUNDS = 6
# On a table of a few cells a round mixes little: after 6, some orders of 5 samples are seldom seen.
_SMALL = 64
_SMALL_ROUNDS = 16


def shard(length: int, rank: int, world_size: int) -> slice:
    """Return the contiguous part of `length` places that `rank` takes.

    Over all ranks every place is taken exactly once; the parts differ in length by one at most, the
    longer ones come first, and where there are fewer places than ranks the last ranks get none.

    Raises:
        ConfigError: `length` is negative, or `rank` is not one of `world_size` ranks.
    """
    if length < 0:
        raise ConfigError(f"the length to share must be 0 or more, not {length}")
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank must be from 0 to world_size - 1, not rank {rank} of world_size {world_size}")
    share, longer = divmod(length, world_size)
    start = rank * share + min(rank, longer)
    return slice(start, start + share + (rank < longer))


def batch_positions(step: int, batch_size: int, length: int) -> range:
    """Return the places, in an epoch of `length` samples, of the global batch of `step`.

    The last batch of an epoch is as short as what is left.

    Raises:
        ConfigError: `batch_size` is below 1, or `step` is not a step of the epoch.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be 1 or more, not {batch_size}")
    steps = -(-length // batch_size)
    if not 0 <= step < steps:
        raise ConfigError(
            f"step must be one of the {steps} of an epoch, counted from 0, not {step}: "
            f"{length} samples in batches of {batch_size}"
        )
    return range(step * batch_size, min((step + 1) * batch_size, length))


def permute(positions: Array, length: int, *, seed: int, epoch: int) -> Array:
    """Return which sample stands at each of `positions` of the global order of `epoch`.

    A bijection of ``[0, length)`` keyed by `seed` and `epoch`: a Feistel network on the cells of an
    almost square table with `length` cells or a few more. A cell beyond `length` is sent through
    again until it is inside, which stays a bijection. The table has fewer than ``sqrt(length) + 1``
    cells too many, so that this is rare, where a table of 2**k cells would be up to half empty.
    Costs ``O(positions)``, whatever `length`.

    Args:
        positions: integers from 0 to ``length - 1``, any shape.
        length: number of samples in the whole data set, up to 2**40.
        seed: the same on all ranks, or they read samples twice.
        epoch: counted from 0; another order each.

    Returns:
        Sample indices, int64, shape of `positions`.

    Raises:
        ConfigError: `length` is out of range, or `positions` are not integers below it.

    Source: Black & Rogaway, "Ciphers with arbitrary finite domains", 2002 (table, cycle walking);
    Patarin, "Security of random Feistel schemes with 5 or more rounds", 2004 (six rounds).
    """
    if not 0 <= length <= MAX_LENGTH:
        raise ConfigError(f"length must be from 0 to 2**40, not {length}")
    positions = np.asarray(positions)
    if positions.size == 0:
        return np.empty(positions.shape, np.int64)
    if positions.dtype.kind not in "iu":
        raise ConfigError(f"positions must be integers, not {positions.dtype}")
    cells = positions.ravel().astype(np.uint64)  # a negative number becomes one beyond any length
    if cells.max() >= length:
        raise ConfigError(
            f"positions must be from 0 to {length - 1} in an order of {length} samples, "
            f"not from {positions.min()} to {positions.max()}"
        )
    rows = math.isqrt(length - 1) + 1
    columns = -(-length // rows)
    rounds = _ROUNDS if length > _SMALL else _SMALL_ROUNDS
    keys = _round_keys(operator.index(seed), operator.index(epoch), rounds)
    cells = _feistel(cells, rows, columns, keys)
    while (outside := np.flatnonzero(cells >= length)).size:
        cells[outside] = _feistel(cells[outside], rows, columns, keys)
    return cells.astype(np.int64).reshape(positions.shape)


def mixed(samples: Array) -> np.ndarray[Any, Any]:
    """Return a hash of each of `samples`, integers from 0 to 2**64 - 1: 31 bits, as uint32."""
    wide = np.asarray(samples).astype(np.uint64)
    return _mix((wide ^ _mix((wide >> np.uint64(32)).astype(np.uint32) ^ np.uint32(0x9E3779B9))).astype(np.uint32))


@functools.lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int, rounds: int) -> tuple[int, ...]:
    """Return a 32-bit key for each round of an epoch's order."""
    words = philox(seed, "order", epoch).random_raw(rounds)
    return tuple(int(word) >> 32 for word in words)


def _feistel(cells: Array, rows: int, columns: int, keys: tuple[int, ...]) -> Array:
    """Return where a keyed bijection of a table of `rows` by `columns` sends `cells`; uint64."""
    quotient = cells // columns
    column = (cells - quotient * columns).astype(np.uint32)
    row = quotient.astype(np.uint32)
    for even, odd in zip(keys[::2], keys[1::2], strict=True):
        row = (row + _mix(column ^ even)) % rows
        column = (column + _mix(row ^ odd)) % columns
    return row.astype(np.uint64) * columns + column


def _mix(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return 31 well-mixed bits of each uint32 of `x`, which is overwritten.

    One bit less than there are, so that adding a row or a column does not wrap around 2**32: that
    would send two cells to one.

    Source: Wellons, "Prospecting for hash functions" (lowbias32), 2018.
    """
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    x >>= 1
    return x
