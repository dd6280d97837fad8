"""Patience: what a rank says that has waited long for another one, where no supervisor watches over it."""

import os
import sys

from disttrain import progress
from disttrain.observe import log

PATIENCE_S = 30.0

_LIBRARY = os.path.dirname(os.path.dirname(__file__)) + os.sep


class Patience:
    """Says in a warning for whom this rank waits, after 30 seconds and each time that these have doubled.

    Under `disttrain run` it stays silent: the supervisor sees all ranks, and names the one that holds them up.

    Args:
        rank: who waits.
        peer: the rank that is waited for.
        begin_s: when the waiting began, by `time.monotonic`.
    """

    def __init__(self, rank: int, peer: int, begin_s: float) -> None:
        self._rank = rank
        self._peer = peer
        self._begin_s = begin_s
        self._limit_s = float("inf") if progress.is_kept() else PATIENCE_S

    def check(self, now_s: float) -> None:
        """Warn, if it is time to; `now_s` is by `time.monotonic`."""
        waited_s = now_s - self._begin_s
        if waited_s >= self._limit_s:
            self._limit_s *= 2
            log.warning(
                "rank %d has waited %.0f s for rank %d in %s, %s; that rank is busy, stopped, or makes another call",
                self._rank, waited_s, self._peer, progress.own().what_words, _caller(),
            )  # fmt: skip


def _caller() -> str:
    """Return file and line of the call into the library."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARY):
        frame = frame.f_back
    return f"called at {frame.f_code.co_filename}:{frame.f_lineno}"
