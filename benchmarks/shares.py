"""Where the time of data-parallel steps goes: computing, communicating, waiting for other ranks, or bringing data.

The communicator's calls are timed on each rank. A rank that is in one waits as long as another has not come to it: that
is told from the clock, which all ranks of a machine share. The rest of the call is communication that nothing hides.
"""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from disttrain.comm import Communicator, Pending
from disttrain.data import Batches

_CALLS = ("all_reduce", "all_gather", "all_gather_json", "broadcast", "broadcast_json", "reduce_scatter", "barrier")


class Shares:
    """Times a rank's steps.

    Args:
        comm: the ranks, all on one machine; all of them make one of these.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._is_inside = False
        self._calls: list[list[float]] = []  # of a step: when this rank came to it, began to wait, and went on
        self._working_s = self._data_s = 0.0

    def of(self, step: Callable[[], Any], count: int) -> dict[str, float]:
        """Return the shares of `count` steps, each the median over steps of the mean over ranks.

        All ranks call this, with steps that make the same calls on each.
        """
        calls, others = [], []
        with self._timed():
            for _ in range(count):
                self._calls, self._working_s, self._data_s = [], 0.0, 0.0
                begin = time.perf_counter()
                step()
                others.append((time.perf_counter() - begin, self._working_s, self._data_s))
                calls.append(self._calls)
        # some steps make more calls than others, as those in which weights are compared: the rest stays 0, and no time
        padded = np.zeros((count, max(map(len, calls)), 3))
        for row, made in zip(padded, calls, strict=True):
            row[: len(made)] = np.reshape(made, (-1, 3))
        # shape (ranks, steps, calls, 3): when each rank came, began to wait, went on
        came, waits, goes = np.moveaxis(self._comm.all_gather(padded), -1, 0)
        whole, working, data = np.moveaxis(self._comm.all_gather(np.array(others)), -1, 0)
        waiting = np.clip(np.minimum(goes, came.max(axis=0)) - waits, 0, None).sum(axis=-1)
        communication = (goes - waits).sum(axis=-1) - waiting + working
        parts = {"communication": communication, "waiting": waiting, "data": data}
        parts["compute"] = whole - communication - waiting - data
        return {name: float(np.median((part / whole).mean(axis=0))) for name, part in parts.items()}

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Time the communicator's calls inside a ``with`` block."""
        comm, batch = self._comm, Batches.batch
        names = ("start_all_reduce", *_CALLS)
        for name in names:
            call = getattr(comm, name)
            setattr(comm, name, self._starting(call) if name == "start_all_reduce" else self._blocking(call))

        def timed_batch(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            made = batch(*args, **kwargs)
            self._data_s += time.perf_counter() - begin
            return made

        Batches.batch = timed_batch  # type: ignore[method-assign]
        try:
            yield
        finally:
            Batches.batch = batch  # type: ignore[method-assign]
            for name in names:
                delattr(comm, name)

    def _blocking(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._is_inside:  # a call that another one makes
                return call(*args, **kwargs)
            self._is_inside = True
            begin = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self._is_inside = False
                self._calls.append([begin, begin, time.perf_counter()])

        return timed

    def _starting(self, call: Callable[..., Pending]) -> Callable[..., "_Timed"]:
        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> _Timed:
            begin = time.perf_counter()
            pending = call(*args, **kwargs)
            self._working_s += time.perf_counter() - begin
            times = [begin, begin, begin]  # as if nobody waited for it
            self._calls.append(times)
            return _Timed(pending, times, self._add_work)

        return timed

    def _add_work(self, seconds: float) -> None:
        self._working_s += seconds


class _Timed:
    """A pending all-reduce that notes its times."""

    def __init__(self, pending: Pending, times: list[float], add_work: Callable[[float], None]) -> None:
        self._pending, self._times, self._add_work = pending, times, add_work

    def advance(self) -> bool:
        begin = time.perf_counter()
        is_done = self._pending.advance()
        self._add_work(time.perf_counter() - begin)
        return is_done

    def wait(self) -> None:
        self._times[1] = time.perf_counter()
        self._pending.wait()
        self._times[2] = time.perf_counter()
