"""Waiting for other processes: without taking the core from them, and not for ever without a word."""

import os
import sys
import time
from collections.abc import Callable

from disttrain import progress
from disttrain.errors import CommError
from disttrain.observe import log

PATIENCE_S = 30.0

# MPICH's own wait never gives up its core. Measured with 4 ranks on 2 cores, of which one works and
# three wait for it: its work took 2.0-2.2 times its processor time when these spun or only yielded (3
# runs each), and 1.0 times with a sleep after 1 ms (2 runs; 1.4 in a third, on a busy machine).
YIELD_S = 1e-3
SLEEP_S = 50e-6
SPINS = 20  # looks before that, without giving up the core: about 10 us, in which most short messages come

_LIBRARY = os.path.dirname(os.path.dirname(__file__)) + os.sep


def wait_until(is_done: Callable[[], bool], limit_s: float = float("inf")) -> bool:
    """Return whether `is_done` has come to return True within `limit_s`."""
    for _ in range(SPINS):
        if is_done():
            return True
    begin = time.monotonic()
    while not is_done():
        waited = time.monotonic() - begin
        if waited >= limit_s:
            return False
        if waited < YIELD_S:
            os.sched_yield()
        else:
            time.sleep(SLEEP_S)
    return True


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
        self.peer = peer
        self._begin_s = begin_s
        self._limit_s = float("inf") if progress.is_kept() else PATIENCE_S

    def check(self, now_s: float) -> None:
        """Warn, if it is time to; `now_s` is by `time.monotonic`."""
        waited_s = now_s - self._begin_s
        if waited_s >= self._limit_s:
            self._limit_s *= 2
            log.warning(
                "rank %d has waited %.0f s for rank %d in %s, %s; that rank is busy, stopped, or makes another call",
                self._rank, waited_s, self.peer, progress.own().what_words, f"called at {caller()}",
            )  # fmt: skip


def left_alone(rank: int, peer: int) -> CommError:
    """Return the error of `rank`, which waits for a `peer` that has left the job."""
    return CommError(
        f"rank {peer} has left the job, its script has ended or called sys.exit(), and rank {rank} waits for it in "
        f"{progress.own().what_words}; every rank must make the same collectives, those of fit(), evaluate(), "
        "predict() and save() among them"
    )


def caller(depth: int = 0) -> str:
    """Return file and line of the call into the library, whose are at least so many calls between that and this one."""
    frame = sys._getframe(depth)
    while (name := frame.f_code.co_filename).startswith(_LIBRARY) and frame.f_back is not None:
        frame = frame.f_back
    return f"{name}:{frame.f_lineno}"
