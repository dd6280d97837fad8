"""Computations that take turns: each goes on until it needs a sum over all of them, then the next one does.

So the shards of a batch, computed one after the other, can be normalized by statistics of the whole batch. One that
needs no such sum runs to its end, and there is no thread; else each of the others has one, of which one at a time runs.
"""

import contextvars
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from disttrain.errors import ConfigError

T = TypeVar("T")


class Turns:
    """Runs computations in turns.

    Args:
        total: returns the sum over all computations, of all ranks, of what these, those of this rank, have asked for.

    Attributes:
        number: of the computation that runs, counted from 0.
    """

    def __init__(self, total: Callable[[list[Any]], Any]) -> None:
        self.number = 0
        self._total = total

    def run(self, computations: Sequence[Callable[[], T]]) -> list[T]:
        """Return the results of `computations`, all of which ask for the same sums.

        Raises:
            ConfigError: they do not.
            BaseException: what the first that failed has raised; the others are given up.
        """
        self._computations = computations
        self._results: list[Any] = [None] * len(computations)
        # what this thread knows of its communicator and step; before a computation adds its own to it
        self._contexts = [contextvars.copy_context() for _ in computations]
        self._turns = [threading.Semaphore(0) for _ in computations]
        self._threads: list[threading.Thread] = []
        self._failure: BaseException | None = None
        self._asked: list[Any] = []
        self.number = 0
        try:
            self._compute(0)
            if self._threads:
                self._pass_on(1)
                self._wait(0)
            else:
                for self.number in range(1, len(computations)):
                    self._compute(self.number)
        except BaseException as error:
            self._give_up(error)
        for thread in self._threads:
            thread.join()
        if self._failure is not None:
            raise self._failure
        return self._results

    def sum(self, value: Any) -> Any:
        """Return the sum of what all computations pass to this call, each its own."""
        number, count = self.number, len(self._computations)
        self._check_asked(number)
        self._asked.append(value)
        if number == count - 1:
            asked, self._asked = self._asked, []
            self._sum = self._total(asked)
        if count > 1:
            self._pass_on((number + 1) % count)
            self._wait(number)
        return self._sum

    def _compute(self, number: int) -> None:
        self._results[number] = self._computations[number]()
        self._check_asked(0)

    def _work(self, number: int) -> None:
        """Run a computation in a thread of its own."""
        try:
            self._compute(number)
            self._pass_on((number + 1) % len(self._computations))
        except BaseException as error:
            self._give_up(error)

    def _pass_on(self, number: int) -> None:
        """Let computation `number` go on, or begin."""
        if self._failure is not None:
            raise _GivenUpError
        self.number = number
        if number == len(self._threads) + 1:
            run = self._contexts[number].run
            thread = threading.Thread(target=run, args=(self._work, number), daemon=True, name=f"part {number}")
            self._threads.append(thread)
            thread.start()
        else:
            self._turns[number].release()

    def _wait(self, number: int) -> None:
        self._turns[number].acquire()
        if self._failure is not None:
            raise _GivenUpError

    def _give_up(self, error: BaseException) -> None:
        self._failure = self._failure or error
        for turn in self._turns:
            turn.release()

    def _check_asked(self, expected: int) -> None:
        if len(self._asked) != expected:
            raise ConfigError(
                "a sum over the batch was asked for by the model in one shard of it and not in another; what a model "
                "calls must not depend on values"
            )


class _GivenUpError(BaseException):
    """Another computation has failed; of BaseException, so that no model takes it for an error of its own."""
