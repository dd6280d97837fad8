"""Restarts: whether a job that has ended is started again, and on how many workers."""

from collections import Counter
from collections.abc import Sequence

from launch.growth import ASK_S
from launch.job import Job
from launch.report import GROWTH, Ending

DOUBT_S = 60.0  # a failed attempt to have more workers may cost as much as half of it
_TRIES = 3  # at a step that the job does not get past


class Restarts:
    """What became of a job so far, and what is to become of it.

    Args:
        job: what is run, again and again.

    Attributes:
        sizes: numbers of workers to try for the next attempt, the most first.
        goes_on: whether there is to be another attempt.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._fewest = job.min_workers or job.workers
        self._causes: list[str] = []
        self._furthest = (0, -1)  # where it has failed: in which `fit`, at which step of it
        self._failures = Counter[tuple[int, int]]()  # since, by place
        self._had = 0  # workers, before it ended so that it could have more
        self._wait_s = ASK_S
        self.sizes: Sequence[int] = range(job.workers, self._fewest - 1, -1)
        self.goes_on = False

    def wait_s(self, workers: int) -> float:
        """Return how long to wait before a job that begins to run on so many workers is to have more.

        Twice as long each time that more could not be started after all.
        """
        if workers <= self._had:
            self._wait_s *= 2
        return self._wait_s

    def doubt(self) -> None:
        """Note that not all workers came which the launcher could start: that it says so again is not worth as much."""
        self._wait_s = max(self._wait_s, DOUBT_S)

    def after(self, ending: Ending, kept: int | None) -> str:
        """Note the end of an attempt, and return what is to be said of what follows; empty: nothing.

        Args:
            ending: of the attempt.
            kept: how many steps the state in memory has, None where there is none.
        """
        self.goes_on = False
        place = "from what the script has saved, or anew" if kept is None else f"from step {kept}"
        if ending.kind == GROWTH or (ending.workers > self._had > 0 and not ending.has_started):
            return self._grown(ending, place)
        self._had, self._wait_s = 0, ASK_S
        if not ending.kind or not self._job.max_restarts:
            return self._summary() if ending.code else ""
        cause, left = ending.cause, self._job.max_restarts - len(self._causes)
        if self._failures_at(ending, kept) == _TRIES:
            return f"disttrain: no restart: {ending.diagnosis(_TRIES)}; a restart does not mend it\n" + self._summary()
        if not left:
            return f"disttrain: no restart is left of {self._job.max_restarts}: {cause}\n" + self._summary()
        self.goes_on = True
        self._causes.append(cause)
        # A rank that never ran is on a host that is lost, or full; any other can be started again.
        most = self.most
        if not ending.has_started:
            most = ending.workers - 1
            self.doubt()
        self.sizes = range(max(most, self._fewest), self._fewest - 1, -1)
        return (
            f"disttrain: restart {len(self._causes)} of {self._job.max_restarts}, because {cause}; it goes on {place},"
        )

    @property
    def most(self) -> int:
        """How many workers it may have."""
        return self._job.max_workers or self._job.workers

    def _failures_at(self, ending: Ending, kept: int | None) -> int:
        """Note a failure, and return how many there were at its step, since the job has failed further on than ever."""
        step = kept if ending.step is None else ending.step
        place = (ending.run, -1 if step is None else step)
        if place > self._furthest:
            self._furthest = place
            self._failures.clear()
        self._failures[place] += 1
        return self._failures[place]

    def _grown(self, ending: Ending, place: str) -> str:
        """Note that it is to have more workers, or that it could not: neither is a failure that counts."""
        self.goes_on = True
        if ending.kind == GROWTH:
            self._wait_s = ASK_S if ending.workers > self._had else self._wait_s  # else it did not grow
            self._had = ending.workers
            self.sizes = range(self.most, self._fewest - 1, -1)
            return f"disttrain: more workers can be started; the job goes on {place},"
        self.doubt()
        self.sizes = range(self._had, self._fewest - 1, -1)
        return f"disttrain: not all of {ending.workers} workers could be started; the job goes on {place},"

    def _summary(self) -> str:
        """Return a line for each restart that there was."""
        causes = enumerate(self._causes, start=1)
        return "".join(f"disttrain: restart {number} was because {cause}\n" for number, cause in causes)
