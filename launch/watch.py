"""The watch: finds the rank that holds up all others, from what ranks note of their progress.

No clock of a rank is read, and no rank is asked: a record that does not change while others wait is what is seen. The
limits are multiples of one number of seconds; docs/launching.md states the rules.
"""

import dataclasses
import json
import socket
import statistics
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from disttrain.progress import Phase, Proxy, Record, read
from launch import posix

RECORD, STACKS = "progress.{}", "stacks.{}"  # of each rank, in the job's folder
PROXY = "proxy.{}"  # of a rank elsewhere: what stands for its process, as JSON

LOOK_S = 0.2  # how often records are read
STEPS = 10  # within a step: so many median steps, but at least the timeout
IDLE, BUSY = 12, 120  # elsewhere: so many timeouts, without and with use of processor or disk

_GONE_S = 1.0  # what a rank that has ended sent before may still arrive
_BLINK_S = 1.0  # more time between two looks was the supervisor's own pause, and counts as this much
_IN_STEP = {Phase.DATA, Phase.FORWARD, Phase.BACKWARD, Phase.BUCKET, Phase.METRICS, Phase.OPTIMIZER, Phase.VALIDATION}
_FEWEST_STEPS = 3  # durations that make a median


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Who holds up the job.

    Attributes:
        rank: the culprit; None where all wait for each other and none can be told.
        kind: "stopped", "stuck", "gone", "differs" or "silence".
        for_s: how long it has been so.
        limit_s: after which it was too long.
        in_step: whether the limit was that of a step.
    """

    rank: int | None
    kind: str
    for_s: float
    limit_s: float
    in_step: bool = False


@dataclass(kw_only=True)
class Sight:
    """What is seen of a rank.

    Attributes:
        record: as it was last read.
        state: of its process, as psutil has it; empty when it has ended.
        still_s: for how long its record has not changed.
        stopped_s: for how long its process has been stopped.
        idle_s: for how long it has used neither processor nor disk, once its record has been still for a while.
        gone_s: for how long it has ended.
        effort: what it has used so far.
    """

    record: Record
    state: str = ""
    still_s: float = 0.0
    stopped_s: float = 0.0
    idle_s: float = 0.0
    gone_s: float = 0.0
    effort: object = None

    @property
    def is_waiting(self) -> bool:
        """Whether it waits for other ranks."""
        return self.record.is_waiting or self.record.phase == Phase.JOIN

    @property
    def has_joined(self) -> bool:
        """Whether it has begun to communicate with other ranks."""
        return self.record.world_size > 1 and (self.record.waits > 0 or self.record.phase == Phase.JOIN)

    @property
    def is_stopped(self) -> bool:
        """Whether a signal has stopped its process."""
        return self.state == psutil.STATUS_STOPPED

    @property
    def can_answer(self) -> bool:
        """Whether it can be asked for its stacks: at its very end the signal that asks would end it."""
        return not self.is_stopped and not self.has_left

    @property
    def has_left(self) -> bool:
        """Whether it will take part in no collective any more."""
        return not self.state or self.record.phase == Phase.LEFT


def read_records(folder: Path, workers: int) -> dict[int, Record]:
    """Return the records in a job's folder of ranks on this host, and of those for which a process here stands."""
    found: dict[int, Record] = {}
    for rank in range(workers):
        record = read(folder / RECORD.format(rank))
        if record is None:
            continue
        proxy = folder / PROXY.format(rank)
        if proxy.exists():
            found[rank] = dataclasses.replace(record, proxy=Proxy(**json.loads(proxy.read_text())))
        elif record.host == socket.gethostname():
            found[rank] = record
    return found


class Watch:
    """Looks at the ranks of a job on this host.

    Args:
        workers: number of ranks.
        timeout_s: what all limits are multiples of; 0: look, and judge nothing.
        state: returns the state of a process as psutil has it, empty when it has ended.
        effort: returns what a process has used of the machine: anything that can be compared.
    """

    def __init__(
        self,
        workers: int,
        timeout_s: float,
        *,
        state: Callable[[int], str] = posix.state,
        effort: Callable[[int], object] = posix.effort,
    ) -> None:
        self.sights: dict[int, Sight] = {}
        self._workers = workers
        self._timeout_s = timeout_s
        self._state = state
        self._effort = effort
        self._looked_s: float | None = None
        self._run = 0
        self._stepped: dict[int, tuple[int, float]] = {}
        self._durations_s: deque[float] = deque(maxlen=101)

    def look(self, now_s: float, records: Mapping[int, Record]) -> Finding | None:
        """Compare the `records` of ranks with those of the last look; return who holds up the job, if anyone does."""
        since_s = 0.0 if self._looked_s is None else min(now_s - self._looked_s, _BLINK_S)
        self._looked_s = now_s
        for rank, record in records.items():
            self._see(rank, record, since_s)
            self._time_step(record, now_s)
        return self._judge(self.sights) if self._timeout_s else None

    @property
    def step_limit_s(self) -> float:
        """How long a rank may stay at one place of a step while others wait for it."""
        return max(self._timeout_s, STEPS * self._median_s)

    @property
    def _median_s(self) -> float:
        return statistics.median(self._durations_s) if self._is_timed else 0.0

    @property
    def _is_timed(self) -> bool:
        return len(self._durations_s) >= _FEWEST_STEPS

    def _see(self, rank: int, record: Record, since_s: float) -> None:
        sight = self.sights.get(rank)
        if sight is None or record != sight.record:
            self.sights[rank] = Sight(record=record, state=self._state_of(record))
            return
        sight.record, sight.state = record, self._state_of(record)
        sight.gone_s = 0.0 if sight.state else sight.gone_s + since_s
        sight.stopped_s = sight.stopped_s + since_s if sight.is_stopped else 0.0
        sight.still_s += since_s
        if sight.still_s >= self._timeout_s and not sight.is_waiting and sight.state:
            effort = self._effort(record.pid) if record.proxy is None else record.proxy.effort
            sight.idle_s = sight.idle_s + since_s if effort == sight.effort else 0.0
            sight.effort = effort

    def _state_of(self, record: Record) -> str:
        return self._state(record.pid) if record.proxy is None else record.proxy.state

    def _time_step(self, record: Record, now_s: float) -> None:
        """Note how long the steps took that were taken since the last look."""
        if record.run > self._run:  # other data or another model: its steps may take longer
            self._run = record.run
            self._stepped.clear()
            self._durations_s.clear()
        if record.step is None:
            return
        step, at_s = self._stepped.get(record.rank, (record.step, now_s))
        if record.step > step:
            self._durations_s.append((now_s - at_s) / (record.step - step))
        if record.step != step or record.rank not in self._stepped:
            self._stepped[record.rank] = record.step, now_s

    def _judge(self, sights: dict[int, Sight]) -> Finding | None:
        there = {rank: sight for rank, sight in sights.items() if not sight.has_left}
        waiting = [sight for sight in there.values() if sight.is_waiting]
        for rank, sight in there.items():
            # At its exit a rank is waited for by those that have got there.
            waits_s = [other.still_s for other in waiting if other is not sight]
            if sight.record.phase == Phase.SHUTDOWN:
                waits_s += [other.still_s for other in sights.values() if other.has_left]
            if waits_s and (found := self._stuck(rank, sight, max(waits_s))):
                return found
        if not there or len(waiting) < len(there):
            return None
        return self._all_wait(sights, there)

    def _stuck(self, rank: int, sight: Sight, waited_s: float) -> Finding | None:
        """Return whether `rank`, for which another has waited, is stopped or stuck."""
        limit_s = self.step_limit_s
        if (for_s := min(sight.stopped_s, waited_s)) >= limit_s:
            return Finding(rank=rank, kind="stopped", for_s=for_s, limit_s=limit_s, in_step=True)
        if sight.is_waiting:
            return None
        if in_step := (sight.record.phase in _IN_STEP and self._is_timed):
            for_s = sight.still_s
        elif sight.idle_s >= IDLE * self._timeout_s:
            for_s, limit_s = sight.idle_s, IDLE * self._timeout_s
        else:
            for_s, limit_s = sight.still_s, BUSY * self._timeout_s
        for_s = min(for_s, waited_s)
        if for_s < limit_s:
            return None
        return Finding(rank=rank, kind="stuck", for_s=for_s, limit_s=limit_s, in_step=in_step)

    def _all_wait(self, sights: dict[int, Sight], there: dict[int, Sight]) -> Finding | None:
        """Return why ranks that all wait, wait for ever."""
        for_s = min(sight.still_s for sight in there.values())
        # fewer than workers, where these go on without some that they have lost
        left = min(self._workers, *(sight.record.world_size for sight in there.values()))
        for rank, sight in sights.items():
            if sight.record.world_size > left:
                continue
            limit_s = self._timeout_s if sight.state else min(self._timeout_s, _GONE_S)
            if sight.has_left and for_s >= limit_s and (sight.state or sight.gone_s >= limit_s):
                return Finding(rank=rank, kind="gone", for_s=for_s, limit_s=limit_s)
        records = {rank: sight.record for rank, sight in there.items() if sight.record.is_waiting}
        limit_s = self.step_limit_s
        if len(records) == left and (odd := odd_one(records)) is not None and for_s >= limit_s:
            return Finding(rank=odd, kind="differs", for_s=for_s, limit_s=limit_s, in_step=True)
        if for_s >= BUSY * self._timeout_s:
            return Finding(rank=None, kind="silence", for_s=for_s, limit_s=BUSY * self._timeout_s)
        return None


def odd_one(records: dict[int, Record]) -> int | None:
    """Return a rank that waits in another call than most; of calls with as many, the one that began first is odd."""
    calls = Counter((record.call, record.group) for record in records.values())
    if len(calls) < 2:
        return None
    usual = max(calls, key=lambda call: (calls[call], call[0][0]))
    return next(rank for rank, record in records.items() if (record.call, record.group) != usual)
