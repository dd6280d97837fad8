"""The ledger of a run: which samples went into the weights, step by step, so that it can be audited afterwards.

At each step all ranks add up how many samples they have read, and a checksum of which; the sums are chained by a hash.
What is kept is short: for each uninterrupted part of a run where it began and ended, on how many workers, and the chain
at its end. Whoever knows the seed can compute which samples each step should have read, and whether the chain says so.
"""

import functools
import hashlib
import hmac
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from disttrain.backend import Array
from disttrain.data.shard import mixed, permute
from disttrain.errors import LedgerError

_HELD = 1 << 40  # sums over up to 2**13 ranks are exact in float64
_AT_ONCE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Order:
    """In which order samples are read: what an auditor must know of a run.

    Attributes:
        samples: in the data set.
        batch_size: of a global batch.
        shuffle: whether each epoch has an order of its own.
        seed: of the orders.
    """

    samples: int
    batch_size: int
    shuffle: bool
    seed: int

    @property
    def steps(self) -> int:
        """Number of steps in an epoch."""
        return -(-self.samples // self.batch_size)


@dataclass(kw_only=True)
class Part:
    """An uninterrupted part of a run.

    Attributes:
        begin: epoch, and step in it, of the first step.
        end: the same, of the step after the last.
        world_size: number of ranks.
        chain: after the last step, in hexadecimal digits.
    """

    begin: tuple[int, int]
    end: tuple[int, int]
    world_size: int
    chain: str


class Ledger:
    """What went into the weights of a run so far.

    Args:
        order: in which samples are read.
        key: of the chain; who does not have it cannot make one. Empty: anybody can.

    Attributes:
        parts: uninterrupted ones, in their order.
    """

    def __init__(self, order: Order, key: bytes = b"") -> None:
        self.order = order
        self._key = key
        self.parts: list[Part] = []
        self._begins = True

    def note(self, epoch: int, step: int, count: int, checksum: int, world_size: int) -> None:
        """Add a step, with the sums over all ranks of what they read.

        Args:
            epoch: counted from 0.
            step: in the epoch, counted from 0.
            count: of the samples.
            checksum: of them, as `checksum`.
            world_size: number of ranks.
        """
        if self._begins or world_size != self.parts[-1].world_size:
            chain = self.parts[-1].chain if self.parts else ""
            here = (epoch, step)
            self.parts.append(Part(begin=here, end=here, world_size=world_size, chain=chain))
            self._begins = False
        part = self.parts[-1]
        part.chain = _chained(self._key, part.chain, epoch, step, count, checksum, world_size)
        part.end = (epoch + 1, 0) if step + 1 == self.order.steps else (epoch, step + 1)

    def state(self) -> list[dict[str, Any]]:
        """Return the parts as JSON values."""
        return [asdict(part) for part in self.parts]

    def restore(self, state: Sequence[dict[str, Any]]) -> None:
        """Go on after what `state` returned; the next step begins a new part."""
        self.parts = [_part(each) for each in state]
        self._begins = True


@dataclass(frozen=True, kw_only=True)
class Account:
    """What an audit has found out.

    Attributes:
        epochs: that are complete, each with every sample exactly once.
        begun: samples of the next epoch that were read, none of them twice.
        world_sizes: number of ranks, of each uninterrupted part.
    """

    epochs: range
    begun: int
    world_sizes: tuple[int, ...]


def checksum(samples: Array) -> int:
    """Return the sum of a hash of each of `samples`, integers, modulo 2**40."""
    return int(mixed(samples).sum(dtype=np.uint64)) % _HELD


def total(value: float) -> int:
    """Return the checksum of samples whose parts have the checksums of which `value` is the sum."""
    return int(value) % _HELD


def audit(order: Order, state: Any, end: tuple[int, int], key: bytes = b"") -> Account:
    """Check that the parts of a ledger say that each sample was read exactly once an epoch, and that their chains do.

    Args:
        order: in which samples were to be read.
        state: of the ledger.
        end: epoch, and step in it, that the run would go on with.
        key: of the chain.

    Raises:
        LedgerError: a part does not begin where the one before it ended; the ledger does not end at `end`; or what
            the ranks have read is not what the chain says. It names the part.
    """
    try:
        parts = [_part(each) for each in state]
    except (TypeError, KeyError, ValueError) as error:
        raise LedgerError(f"the ledger is not one: {error}") from error
    if not parts:
        raise LedgerError("the ledger is empty: no step was noted")
    chain, place = "", (parts[0].begin[0], 0)
    steps = _steps(order, place[0])
    for number, part in enumerate(parts):
        if part.begin != place:
            raise LedgerError(
                f"part {number} of the ledger begins with {_words(part.begin)}, and {_words(place)} was next: "
                f"samples were {'left out' if part.begin > place else 'read twice'}"
            )
        if not part.begin < part.end or not 0 <= part.end[1] < order.steps:
            raise LedgerError(f"part {number} of the ledger ends before {_words(part.end)}, which is no such step")
        while place != part.end:
            epoch, step, count, its = next(steps)
            chain = _chained(key, chain, epoch, step, count, its, part.world_size)
            place = (epoch + 1, 0) if step + 1 == order.steps else (epoch, step + 1)
        if not hmac.compare_digest(chain, part.chain):
            raise LedgerError(
                f"the chain of part {number} of the ledger, {_words(part.begin)} up to {_words(part.end)}, is not that "
                "of the samples that were to be read: other samples were, or it was changed, or has another key"
            )
    if place != end:
        raise LedgerError(f"the ledger ends before {_words(place)}, and the run goes on with {_words(end)}")
    return Account(
        epochs=range(parts[0].begin[0], place[0]),
        begun=min(place[1] * order.batch_size, order.samples),
        world_sizes=tuple(part.world_size for part in parts),
    )


def _steps(order: Order, epoch: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield epoch, step, number of samples and their checksum, for all steps from `epoch` on; check each epoch."""
    everything = functools.cache(lambda: sum(checksum(np.arange(*part)) for part in _cut(order.samples, _AT_ONCE)))
    some = max(1, _AT_ONCE // order.batch_size) * order.batch_size
    while True:
        read = 0
        for start, stop in _cut(order.samples, some):
            positions = np.arange(start, stop)
            if order.shuffle:
                positions = permute(positions, order.samples, seed=order.seed, epoch=epoch)
            batches = list(_cut(stop - start, order.batch_size))
            sums = np.add.reduceat(mixed(positions), [begin for begin, _ in batches], dtype=np.uint64)
            read += int(sums.sum(dtype=np.uint64))
            if stop == order.samples and (read - everything()) % _HELD:
                raise LedgerError(f"the order of epoch {epoch} does not have every sample once")
            for number, ((begin, end), its) in enumerate(zip(batches, sums, strict=True), start // order.batch_size):
                yield epoch, number, end - begin, int(its) % _HELD
        epoch += 1


def _cut(length: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield where pieces of at most `size` begin and end."""
    for start in range(0, length, size):
        yield start, min(start + size, length)


def _chained(key: bytes, chain: str, *facts: int) -> str:
    """Return the chain after one more step. Source: Krawczyk et al., "HMAC", RFC 2104."""
    return hmac.new(key, f"{chain} {' '.join(map(str, facts))}".encode(), hashlib.sha256).hexdigest()


def _part(state: dict[str, Any]) -> Part:
    begin, end = ((int(epoch), int(step)) for epoch, step in (state["begin"], state["end"]))
    return Part(begin=begin, end=end, world_size=int(state["world_size"]), chain=str(state["chain"]))


def _words(place: tuple[int, int]) -> str:
    return f"step {place[1]} of epoch {place[0]}"
