"""Remembering the last step: its state is left with the supervisor, where a job that is started again finds it.

Rank 0 writes, between two steps. A state costs a copy of weights and optimizer; where that is more than a fiftieth of a
step, not every step is remembered, so that what is lost with a worker is as long as fifty copies, not longer.
"""

import itertools
import json
import time
from collections import deque
from typing import Any

from safetensors.numpy import load as decode_tensors

from disttrain import env, progress
from disttrain.checkpoint import Checkpoint, Tensors
from disttrain.checkpoint.format import check_writable, encode
from disttrain.checkpoint.writing import whole
from disttrain.comm import Communicator
from disttrain.errors import CheckpointError
from disttrain.last_step import Bytes, Store, opened
from disttrain.observe import log

_SHARE = 0.02  # of the time of training, at most
_COSTS = 5  # of which the least counts: another program may have had the processor meanwhile
_FEWEST_COSTS = 3  # known, before a step is left out: the first writes also take the memory
_LENGTH_BYTES = 8


class Memory:
    """What one `fit` leaves with the supervisor of its job, if that keeps anything; every rank has one.

    Args:
        comm: the ranks.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._address = env.last_step()
        self._last: Store | None = None
        self._fit = 0  # which call of fit() this is, counted from 1
        self._costs_s: deque[float] = deque(maxlen=_COSTS)
        self._kept_s = self._voted_s = time.monotonic()

    def begin(self, taken: int) -> Checkpoint | None:
        """Return on rank 0 the state to go on from, if this `fit` left one after more steps than were `taken`.

        Args:
            taken: number of steps, over all epochs, as far as this run knows.
        """
        self._fit = progress.own().run
        if not self._address or self._comm.rank > 0:
            return None
        try:
            self._last = opened(self._address)
        except OSError as error:
            log.warning("nothing is remembered for a restart: the supervisor's memory is out of reach: %s", error)
            return None
        found = self._last.read()
        if found is None:
            return None
        step, data = found
        fit, saved = _unpacked(data)
        if fit > self._fit:
            self._forget()  # a later fit() of the script has left it, which goes on from it when it is called
        return saved if fit == self._fit and step > taken else None

    @property
    def is_kept(self) -> bool:
        """Whether there is a supervisor that keeps states: the same on all ranks."""
        return bool(self._address)

    def vote(self) -> float:
        """Return 1 on rank 0 if the step that begins is to be remembered, 2 if it is to be the last as well.

        The sums that it begins with tell all ranks.
        """
        if self._last is None:
            return 0.0
        if progress.is_asked_to_end():
            return 2.0
        now_s = time.monotonic()
        step_s, self._voted_s = now_s - self._voted_s, now_s
        if len(self._costs_s) < _FEWEST_COSTS:
            return 1.0
        return float(now_s + step_s - self._kept_s >= min(self._costs_s) / _SHARE)

    def keep(self, step: int, tensors: Tensors, values: Any, begin_s: float) -> bool:
        """Leave a state with the supervisor, from rank 0, and return whether it is there; others do nothing.

        Args:
            step: how many steps were taken.
            tensors: arrays by group and name.
            values: what JSON can hold.
            begin_s: when the state began to be gathered.
        """
        if self._last is None:
            return False
        try:
            self._last.write(step, _packed(self._fit, tensors, values))
        except (CheckpointError, OSError, TypeError, ValueError, RecursionError) as error:  # or what JSON cannot hold
            log.warning("nothing more is remembered for a restart, which would go on from what there is: %s", error)
            self._forget()
            return False
        self._kept_s = time.monotonic()
        self._costs_s.append(self._kept_s - begin_s)
        return True

    def close(self) -> None:
        """Let go of the memory; the supervisor holds it."""
        self._forget()

    def _forget(self) -> None:
        if self._last is not None:
            self._last.close()
            self._last = None


def _packed(fit: int, tensors: Tensors, values: Any) -> list[Bytes]:
    """Return a state as bytes: the length of a JSON text, that, and a safetensors file of each group."""
    pieces = whole(tensors)
    check_writable(pieces)
    groups = {group: list(encode(held)) for group, held in pieces.items()}
    sizes = {group: sum(map(len, chunks)) for group, chunks in groups.items()}
    text = json.dumps({"fit": fit, "sizes": sizes, "values": values}).encode()
    return [len(text).to_bytes(_LENGTH_BYTES, "little"), text, *itertools.chain(*groups.values())]


def _unpacked(data: bytes) -> tuple[int, Checkpoint]:
    """Return which `fit` left a state, and that; the memory's own check has found the bytes whole."""
    at = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
    head = json.loads(data[_LENGTH_BYTES:at])
    tensors = {}
    for group, size in head["sizes"].items():
        tensors[group] = decode_tensors(data[at : at + size])
        at += size
    return head["fit"], Checkpoint(place="the supervisor's memory", tensors=tensors, values=head["values"])
