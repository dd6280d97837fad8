"""When training is to end before it is done: a signal, or the time limit of the job."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from disttrain import env

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
MARGIN_S = 30.0  # before the time limit, for the end of the program


class EndOfTime:
    """Hears the signals that ask a job to end, inside a ``with`` block, and knows when its time is up.

    They may come several times, from the launcher and from the scheduler. One that nobody has asked for when the block
    is left is sent again then.

    Args:
        time_limit_s: seconds from the beginning of the block to the end of the job; None: as the scheduler says.

    Attributes:
        took_s: how long a checkpoint takes, in seconds; so long before the limit, and half a minute, it is near.
    """

    def __init__(self, time_limit_s: float | None) -> None:
        self._time_limit_s = time_limit_s
        self._limit_s: float | None = None
        self._received: signal.Signals | None = None
        self._is_answered = False
        self._before: dict[signal.Signals, Any] = {}
        self.took_s = 0.0

    def __enter__(self) -> "EndOfTime":
        limit_s, end_s = self._time_limit_s, env.end_s()
        if limit_s is None and end_s is not None:
            limit_s = end_s - time.time()
        self._limit_s = None if limit_s is None else time.monotonic() + limit_s
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._received is not None and not self._is_answered:
            signal.raise_signal(self._received)

    def is_near(self) -> bool:
        """Return whether training is to end now, as far as this rank knows."""
        self._is_answered = self._received is not None
        return self._is_answered or self._is_time()

    def reason(self) -> str:
        """Return why, in words; empty where this rank knows of nothing."""
        if self._received is not None:
            return f"received {self._received.name}"
        return "the time limit of the job is near" if self._is_time() else ""

    def _is_time(self) -> bool:
        return self._limit_s is not None and time.monotonic() > self._limit_s - MARGIN_S - 2 * self.took_s

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self._received = signal.Signals(number)
