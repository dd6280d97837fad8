"""Arrays in batches: each rank gets its part of every global batch, at any step, at once."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from disttrain.backend import Array, floatx, to_host
from disttrain.data.shard import batch_positions, permute, shard
from disttrain.errors import ConfigError, DataError

_PLACES_AT_ONCE = 1 << 12


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's part of a global batch; it is empty where there are more ranks than samples.

    Attributes:
        x: inputs, shape ``(n, ...)``.
        y: targets, shape ``(n, ...)``, or None where there are none.
        first: place in the global batch of the first sample of this part.
        global_size: number of samples in the global batch, over all ranks: what a mean divides by.
        samples: which of the data set's these are, shape ``(n,)``; a shard of a batch has those of all of it.
    """

    x: Array
    y: Array | None
    first: int
    global_size: int
    samples: Array


class Batches:
    """The batches of a data set in memory, as one rank sees them.

    In every epoch each sample is in one batch of one rank, once; nothing is padded or left out, and
    the last batch may be short. The global batches, and the order within, do not depend on
    `world_size`: the parts of ranks 0, 1, ... one after the other are the batch of a single rank.

    Floating-point data become `floatx()` batch by batch, so that no second copy of the set is held;
    integers stay what they are. Without `shuffle` a batch may be a view of the data: not to be
    written to.

    Args:
        x: inputs, shape ``(samples, ...)``: an array, or lists that make one.
        y: targets, shape ``(samples, ...)``, or None.
        batch_size: samples in a global batch, over all ranks.
        shuffle: whether each epoch has an order of its own; else all have that of the data.
        seed: of the orders; the same on all ranks.
        rank: whose part to take.
        world_size: number of ranks that share a batch.
        shards: into how many parts of equal lengths, but for one sample, a batch is cut before ranks share those;
            None: ranks share samples.

    Raises:
        DataError: `x` or `y` has no samples, or is not made of numbers; or their lengths differ.
        ConfigError: `batch_size` is not a positive integer, or `rank` is not one of `world_size`.
    """

    def __init__(
        self,
        x: Array,
        y: Array | None = None,
        *,
        batch_size: int,
        shuffle: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shards: int | None = None,
    ) -> None:
        self.x = _samples("x", x)
        self.y = None if y is None else _samples("y", y)
        if self.y is not None and len(self.x) != len(self.y):
            raise DataError(f"x has {len(self.x)} samples and y has {len(self.y)}: each sample needs its target")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer):
            raise ConfigError(f"batch_size must be an integer, not {batch_size!r}")
        if batch_size < 1:
            raise ConfigError(f"batch_size must be 1 or more, not {batch_size}")
        shard(0, rank, world_size)  # raises where there is no such rank
        self.batch_size = int(batch_size)
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.shards = shards
        self._ahead: tuple[int, range, np.ndarray[Any, Any]] | None = None  # epoch, places, samples

    @property
    def steps_per_epoch(self) -> int:
        """Number of global batches in an epoch, the last short one among them."""
        return -(-len(self.x) // self.batch_size)

    def batch(self, epoch: int, step: int) -> Batch:
        """Return this rank's part of the global batch of `step`, counted from 0 in each epoch.

        Costs the same at any step.

        Raises:
            ConfigError: `step` is not one of the epoch's.
        """
        places = batch_positions(step, self.batch_size, len(self.x))
        part = self._part(len(places))
        mine = places[part]
        return Batch(
            x=self._taken(self.x, epoch, mine),
            y=None if self.y is None else self._taken(self.y, epoch, mine),
            first=part.start,
            global_size=len(places),
            samples=self._order(epoch, mine) if self.shuffle else np.arange(mine.start, mine.stop),
        )

    def _part(self, length: int) -> slice:
        """Return which of a batch's samples this rank takes."""
        if self.shards is None:
            return shard(length, self.rank, self.world_size)
        run = shard(self.shards, self.rank, self.world_size)
        if run.start == run.stop:
            return slice(length, length)
        return slice(shard(length, run.start, self.shards).start, shard(length, run.stop - 1, self.shards).stop)

    def _taken(self, data: np.ndarray[Any, Any], epoch: int, places: range) -> np.ndarray[Any, Any]:
        """Return the samples at `places` of the epoch's order."""
        if not self.shuffle:
            return _cast(data[places.start : places.stop])
        order = self._order(epoch, places)
        # `take` is faster, and copies all of what is not contiguous first
        return _cast(data.take(order, axis=0) if data.flags.c_contiguous else data[order])

    def _order(self, epoch: int, places: range) -> np.ndarray[Any, Any]:
        """Return which samples stand at `places`; computed for some batches at once, since a call costs as much."""
        if self._ahead is None or epoch != self._ahead[0] or not _within(places, self._ahead[1]):
            stop = min(max(places.stop, places.start + _PLACES_AT_ONCE), len(self.x))
            ahead = range(places.start, stop)
            order = permute(np.arange(ahead.start, ahead.stop), len(self.x), seed=self.seed, epoch=epoch)
            self._ahead = (epoch, ahead, order)
        _, ahead, order = self._ahead
        return order[places.start - ahead.start : places.stop - ahead.start]

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of `epoch` from `first_step` on: none when it is just past the last.

        Raises:
            ConfigError: `first_step` is further past the last step, or negative.
        """
        if not 0 <= first_step <= self.steps_per_epoch:
            raise ConfigError(
                f"first_step must be from 0 to {self.steps_per_epoch}, the steps of an epoch, not {first_step}"
            )
        for step in range(first_step, self.steps_per_epoch):
            yield self.batch(epoch, step)


def _within(places: range, others: range) -> bool:
    return others.start <= places.start and places.stop <= others.stop


def _samples(name: str, data: Array) -> np.ndarray[Any, Any]:
    """Return `data` as an array with samples along its first axis."""
    try:
        array = to_host(data)
    except ValueError as error:
        raise DataError(f"{name} is not an array: its samples differ in shape ({error})") from error
    if array.dtype.kind not in "biuf":
        raise DataError(
            f"{name} must be made of numbers, and its dtype is {array.dtype}; "
            "turn it into an array of integers or floats first"
        )
    if array.ndim == 0 or len(array) == 0:
        raise DataError(f"{name} has no samples: its shape is {array.shape}, expected (samples, ...)")
    return array


def _cast(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return floats as `floatx()`, anything else as it is."""
    return array.astype(floatx(), copy=False) if array.dtype.kind == "f" else array
