"""Growth: a job that has fewer workers than were asked for goes on with more, once its launcher can start them."""

import dataclasses
import threading

from disttrain.errors import DisttrainError
from launch.job import Job, commands

ASK_S = 10.0  # between two questions to the launcher


class Growth:
    """Asks the launcher of a job that runs whether it could start more workers; in a thread: that may take a while.

    Args:
        job: as it was asked for.
        most: how many workers are wanted.
        wait_s: to the first question, from when it has begun, or has lost a worker.
    """

    def __init__(self, job: Job, most: int, wait_s: float) -> None:
        self._job = job
        self._most = most
        self._wait_s = wait_s
        self._workers = 0  # when it was looked at last
        self._next_s = 0.0
        self._question: threading.Thread | None = None
        self._found = 0

    def hurry(self) -> None:
        """Ask as soon as possible, for as many as the job may have."""
        self._most = self._job.max_workers or self._job.workers
        self._wait_s = 0.0
        self._workers = 0

    def look(self, now_s: float, workers: int) -> bool:
        """Return whether more than `workers`, as many as there are, can be started, as far as is known."""
        if workers != self._workers:
            self._workers, self._next_s = workers, now_s + self._wait_s
        if self._question is None and workers < self._most and now_s >= self._next_s:
            self._question = threading.Thread(target=self._ask, args=(workers,), daemon=True, name="growth")
            self._question.start()
        if self._question is not None and not self._question.is_alive():
            self._question, self._next_s = None, now_s + ASK_S
        return self._found > workers

    def _ask(self, workers: int) -> None:
        for number in range(self._most, workers, -1):
            try:
                commands(dataclasses.replace(self._job, workers=number))
            except DisttrainError:
                continue
            self._found = number
            return
