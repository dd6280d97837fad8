"""Stragglers: names a rank that the others wait for again and again, and in what it is slow; it ends nothing.

Ranks wait for each other in every step, so that all steps take as long as those of the slowest. Of its own part of
them each rank adds up in its record what it has spent on what (`disttrain.progress.Spent`), and what it has waited.
Two looks between which every rank has begun another step make a slice. Of the last slices that one is left out in
which a rank took longest: a pause is no slowness. A rank is slow if its part of a step took

- at least 3 times as long as that of the others, their median, in 5 slices; or 1.5 times as long in 20; and longer
  than what more samples explain; and
- so much longer that this is a fifth of its step, or more.

Its part is data, computing, and callbacks, without those that rank 0 alone has, since it writes for all. Only where
no rank is slow by these does the time count that it takes to send.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from disttrain.progress import Record, Spent

WINDOWS = {5: 3.0, 20: 1.5}  # slices, of at least a step and a look each, and how many times as long
LOST = 0.2  # of its step
FIRST_STEPS = 3  # of a `fit` take as long as they like
QUIET = 100  # slices without slowness, after which it is news again
_MOST = 0.75  # of what is lost: another kind as large is news

_TRY = {
    "data": "look at what this rank does to load a batch, and at the disk or network that it reads from",
    "compute": "look at what else runs on its host and on its cores (top), at their frequency, and for code in the "
    "model that does more on this rank",
    "callbacks": "look for a callback, or code of the script, that does more on this rank",
    "network": "look at the network interface of its host, and at what else sends through it",
}
_IN = {"callbacks": "compute, in callbacks or the script's own code", "compute": "compute, in the model's steps"}


@dataclass(frozen=True, kw_only=True)
class Part:
    """A rank's part of one or more slices.

    Attributes:
        steps: that it has begun.
        samples: that these have had.
        spent: on what, in nanoseconds.
    """

    steps: int
    samples: int
    spent: Spent

    def per_step(self, value: float) -> float:
        """Return `value`, of the whole part, for each of its steps."""
        return value / self.steps


Slice = Mapping[int, Part]  # by rank


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
        self._is_warm = False
        self._slices: deque[Slice] = deque(maxlen=max(WINDOWS))
        self._named: dict[int, str] = {}  # what was said of which ranks
        self._quiet: dict[int, int] = {}  # for how many slices these have not been slow

    def look(self, records: Mapping[int, Record]) -> list[Straggler]:
        """Return the ranks that are slow, by their `records`, where that is news."""
        left = min((record.world_size for record in records.values()), default=0)
        now = {r: record for r, record in records.items() if record.world_size == left and record.step is not None}
        if now.keys() != self._last.keys() or any(_is_another(now[r], self._last[r]) for r in now):
            self._last, self._is_warm = now, False
            self._slices.clear()
            return []
        steps = {r: now[r].begun[1] - self._last[r].begun[1] for r in now}
        if len(now) < 2 or min(steps.values()) < (1 if self._is_warm else FIRST_STEPS):
            return []
        if self._is_warm:
            self._slices.append({r: _between(self._last[r], now[r]) for r in now})
        self._last, self._is_warm = now, True
        return self._news(find(self._slices))

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


def find(slices: Sequence[Slice]) -> dict[int, Straggler]:
    """Return the ranks that are slow in the last of `slices`."""
    for measure in (_without_network, _with_network):
        found: dict[int, Straggler] = {}
        for length, times in WINDOWS.items():
            window = list(slices)[-length:]
            for rank in window[-1] if len(window) == length else ():
                straggler = judge(window, rank, times, measure)
                if straggler is not None and rank not in found:
                    found[rank] = straggler
        if found:
            return found
    return {}


Measure = Callable[[Spent], dict[str, float]]  # what counts of it, by kind


def judge(window: Sequence[Slice], rank: int, times: float, measure: Measure) -> Straggler | None:
    """Return whether, and in what, a rank is slow in a number of slices.

    Args:
        window: the slices, at least two.
        rank: whose part is compared with that of the others.
        times: as long it must be.
        measure: what it consists of.
    """
    longest = max(range(len(window)), key=lambda i: sum(measure(window[i][rank].spent).values()))
    parts = {r: _total([s[r] for i, s in enumerate(window) if i != longest]) for r in window[0]}
    own = parts.pop(rank)
    kinds = {r: {kind: part.per_step(ns) for kind, ns in measure(part.spent).items()} for r, part in parts.items()}
    mine = {kind: own.per_step(ns) for kind, ns in measure(own.spent).items()}
    usual = {kind: median(each[kind] for each in kinds.values()) for kind in mine}
    if rank == 0:
        mine["callbacks"] = min(mine["callbacks"], usual["callbacks"])
    samples = median(part.per_step(part.samples) for part in parts.values())
    more = max(1.0, own.per_step(own.samples) / samples) if samples else 1.0
    part_ns, usual_ns = sum(mine.values()), more * median(sum(each.values()) for each in kinds.values())
    waits_ns = own.per_step(own.spent.waiting)
    if part_ns < times * usual_ns or part_ns - usual_ns <= LOST * (part_ns + waits_ns):
        return None
    excess = {kind: max(0.0, mine[kind] - more * usual[kind]) for kind in mine}
    kind = max(excess, key=excess.__getitem__)
    share = excess[kind] / sum(excess.values())
    return Straggler(rank=rank, kind=kind, share=share, part_s=part_ns / 1e9, usual_s=usual_ns / 1e9)


def _without_network(spent: Spent) -> dict[str, float]:
    return {"data": spent.data, "compute": spent.compute, "callbacks": spent.own}


def _with_network(spent: Spent) -> dict[str, float]:
    return {**_without_network(spent), "network": spent.network}


def _total(parts: Sequence[Part]) -> Part:
    return Part(
        steps=sum(part.steps for part in parts),
        samples=sum(part.samples for part in parts),
        spent=Spent(*map(sum, zip(*(part.spent for part in parts), strict=True))),
    )


def _between(before: Record, after: Record) -> Part:
    spent = Spent(*(b - a for a, b in zip(before.spent, after.spent, strict=True)))
    return Part(steps=after.begun[1] - before.begun[1], samples=after.samples - before.samples, spent=spent)


def _is_another(record: Record, last: Record) -> bool:
    """Return whether these are not of the same run, one later than the other."""
    before = (last.pid, last.run, last.world_size)
    return (record.pid, record.run, record.world_size) != before or record.begun < last.begun


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
