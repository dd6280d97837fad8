"""Stragglers: names a rank that the others wait for again and again, and in what it is slow; it ends nothing.

Ranks wait for each other in every step, so that all steps take as long as those of the slowest. Of its own part of
them each rank adds up in its record what it has spent on what (`disttrain.progress.Spent`), and what it has waited.
Two looks between which every rank has begun another step make a slice. A rank is slow if its part of a step took

- at least 3 times as long as that of the others, their median, in the last 5 slices, or 1.5 times as long in 20;
  also without the slice in which it took longest, since a pause is no slowness; and so much longer than what more
  samples explain; and
- so much longer that this is a fifth of its step, or more.

Its part is data, computing, and callbacks, without those that rank 0 alone has, since it writes for all. Only where
no rank is slow by these does the time count that it takes to send.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import sub
from statistics import median

from disttrain.progress import Record, Spent

WINDOWS = {5: 3.0, 20: 1.5}  # slices, of at least a step and a look each, and how many times as long
LOST = 0.2  # of its step
FIRST_STEPS = 3  # of a `fit` take as long as they like
QUIET = 100  # slices without slowness, after which it is news again
_MOST = 0.75  # of what is lost: another kind as large is news

_CALLBACKS, _WAITING = Spent._fields.index("callbacks"), Spent._fields.index("waiting")
_WITH_NETWORK, _WITHOUT_NETWORK = _WAITING, Spent._fields.index("network")  # so many fields of `Spent`

_TRY = {
    "data": "look at what this rank does to load a batch, and at the disk or network that it reads from",
    "compute": "look at what else runs on its host and on its cores (top), at their frequency, and for code in the "
    "model that does more on this rank",
    "callbacks": "look for a callback, or code of the script, that does more on this rank",
    "network": "look at the network interface of its host, and at what else sends through it",
}
_IN = {"callbacks": "compute, in callbacks or the script's own code", "compute": "compute, in the model's steps"}


Look = Mapping[int, tuple[int, ...]]  # by rank: steps begun, their samples, and the nanoseconds of `Spent`


@dataclass(frozen=True, kw_only=True)
class Part:
    """A rank's part of a step, on average.

    Attributes:
        samples: that it had.
        spent: on what, in nanoseconds.
    """

    samples: float
    spent: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Straggler:
    """A rank that is slow.

    Attributes:
        rank: which.
        kind: in what most of all: "data", "compute", "callbacks" or "network".
        share: of what it takes longer than others, in that kind.
        part_s: how long its part of a step took.
        usual_s: how long that of the others took.
    """

    rank: int
    kind: str
    share: float
    part_s: float
    usual_s: float

    def words(self, record: Record) -> str:
        """Return what is to be said of it, given its `record`."""
        times = self.part_s / self.usual_s if self.usual_s else float("inf")
        return (
            f"disttrain: rank {self.rank} of {record.world_size} is slow, on host {record.host}, pid {record.pid}, at "
            f"step {record.step}: its part of a step takes {times:.1f} times as long as that of the others, "
            f"{_ms(self.part_s)} instead of {_ms(self.usual_s)}, {self.share:.0%} of the difference in "
            f"{_IN.get(self.kind, self.kind)}; they wait for it, and training goes on\nTry: {_TRY[self.kind]}\n"
        )


class Stragglers:
    """Looks at the ranks of a job, again and again."""

    def __init__(self) -> None:
        self._last: Mapping[int, Record] = {}
        self._looks: deque[Look] = deque(maxlen=max(WINDOWS) + 1)
        self._named: dict[int, str] = {}  # what was said of which ranks
        self._quiet: dict[int, int] = {}  # for how many slices these have not been slow

    def look(self, records: Mapping[int, Record]) -> list[Straggler]:
        """Return the ranks that are slow, by their `records`, where that is news."""
        left = min((record.world_size for record in records.values()), default=0)
        now = {r: record for r, record in records.items() if record.world_size == left and record.step is not None}
        if now.keys() != self._last.keys() or any(_is_another(now[r], self._last[r]) for r in now):
            self._last = now
            self._looks.clear()
            return []
        begun = min((now[r].begun[1] - self._last[r].begun[1] for r in now), default=0)
        if len(now) < 2 or begun < (1 if self._looks else FIRST_STEPS):
            return []
        self._last = now
        self._looks.append({r: (each.begun[1], each.samples, *each.spent) for r, each in now.items()})
        return self._news(find(list(self._looks)))

    def _news(self, slow: Mapping[int, Straggler]) -> list[Straggler]:
        for rank in list(self._named):
            self._quiet[rank] = 0 if rank in slow else self._quiet[rank] + 1
            if self._quiet[rank] >= QUIET:
                del self._named[rank]
        news = [each for rank, each in slow.items() if self._is_news(self._named.get(rank), each)]
        for each in news:
            self._named[each.rank], self._quiet[each.rank] = each.kind, 0
        return news

    @staticmethod
    def _is_news(known: str | None, found: Straggler) -> bool:
        return known is None or (found.kind != known and found.share >= _MOST)


def find(looks: Sequence[Look]) -> dict[int, Straggler]:
    """Return the ranks that are slow in the slices between the last of `looks`, all at the same ranks."""
    for kinds in (_WITHOUT_NETWORK, _WITH_NETWORK):
        found: dict[int, Straggler] = {}
        for slices, times in WINDOWS.items():
            if len(looks) > slices:
                found = _slow(looks[-slices - 1 :], times, kinds) | found
        if found:
            return found
    return {}


def _slow(looks: Sequence[Look], times: float, kinds: int) -> dict[int, Straggler]:
    """Return the ranks that are slow between all `looks`, and also without the slice in which they took longest."""
    found = {}
    parts = {each: _part(_since(looks[0], looks[-1], each)) for each in looks[0]}
    for rank in parts:
        if judge(parts, rank, times, kinds) is None:
            continue
        slices = list(pairwise(looks))
        first, end = max(slices, key=lambda ends: sum(_since(ends[0], ends[1], rank)[2 : 2 + kinds]))
        others = {each: _part(map(sub, _since(looks[0], looks[-1], each), _since(first, end, each))) for each in parts}
        if (straggler := judge(others, rank, times, kinds)) is not None:
            found[rank] = straggler
    return found


def _since(first: Look, last: Look, rank: int) -> tuple[int, ...]:
    return tuple(map(sub, last[rank], first[rank]))


def _part(counts: Iterable[int]) -> Part:
    steps, samples, *spent = counts
    return Part(samples=samples / steps, spent=tuple(ns / steps for ns in spent))


def judge(parts: Mapping[int, Part], rank: int, times: float, kinds: int) -> Straggler | None:
    """Return whether, and in what, a rank is slow.

    Args:
        parts: of all ranks, at least two.
        rank: whose part is compared with the others'.
        times: as long it must be.
        kinds: of what is spent, so many count, in the order of `Spent`.
    """
    own = parts[rank]
    others = [part for each, part in parts.items() if each != rank]
    usual_ns = median(sum(part.spent[:kinds]) for part in others)
    samples = median(part.samples for part in others)
    if sum(own.spent[:kinds]) < times * usual_ns or (own.samples and not samples):
        return None
    more = max(1.0, own.samples / samples) if samples else 1.0  # fewer samples explain nothing
    mine = list(own.spent[:kinds])
    usual = [median(part.spent[kind] for part in others) for kind in range(kinds)]
    if rank == 0:
        mine[_CALLBACKS] = min(mine[_CALLBACKS], usual[_CALLBACKS])
    excess = [max(0.0, ns - more * theirs) for ns, theirs in zip(mine, usual, strict=True)]
    part_ns, usual_ns = sum(mine), more * usual_ns
    lost_ns = min(part_ns - usual_ns, sum(excess))
    if part_ns < times * usual_ns or lost_ns <= LOST * (part_ns + own.spent[_WAITING]):
        return None
    kind = excess.index(max(excess))
    return Straggler(
        rank=rank,
        kind=Spent._fields[kind],
        share=excess[kind] / sum(excess),
        part_s=part_ns / 1e9,
        usual_s=usual_ns / 1e9,
    )


def _is_another(record: Record, last: Record) -> bool:
    """Return whether these are not of the same run, one later than the other."""
    before = (last.pid, last.run, last.world_size)
    return (record.pid, record.run, record.world_size) != before or record.begun < last.begun


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
