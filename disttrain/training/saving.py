"""Checkpoints among ranks: written beside the training, each rank a part; read by rank 0, so that all get the same."""

import os
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from disttrain import checkpoint, progress
from disttrain.checkpoint import Checkpoint, Keep, Metric, Tensors
from disttrain.checkpoint.format import check_writable, plain
from disttrain.checkpoint.inspection import repair
from disttrain.checkpoint.pieces import Pieces, Snapshot, share
from disttrain.checkpoint.storage import Claim, Storage, storage
from disttrain.checkpoint.writing import CancelledError
from disttrain.checkpoint.writing import write as write_pieces
from disttrain.comm import Communicator
from disttrain.errors import CheckpointError, DisttrainError
from disttrain.observe import log
from disttrain.progress import Phase
from disttrain.training.agreement import together

T = TypeVar("T")

_ROUND_S = 0.05  # between two looks at how far other ranks are
_WARN_S = 60.0  # of waiting for a disk
_LAST_S = 60.0  # for a write that is under way when training fails


class Saver:
    """Writes checkpoints of what all ranks hold, while they train on; every rank has one.

    A save copies what this rank is to write and returns; a thread writes it. There is one write at a time: a save that
    finds another under way waits for it. Where all ranks see the same directory each writes an equal part; where they
    do not, rank 0 writes all. An error of a thread is raised by the next `save` or `wait`, on all ranks.

    Args:
        comm: the ranks.

    Attributes:
        stalls_s: for each save, how long training stood still for it, in seconds.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._snapshot = Snapshot()
        self._writers: dict[str, int] = {}  # by place, how many ranks write there
        self._writing: _Writing | None = None
        self.stalls_s: list[float] = []

    @property
    def has_failed(self) -> bool:
        """Whether this rank's part could not be written; the others do not know it yet."""
        return self._writing is not None and self._writing.error is not None

    @property
    def took_s(self) -> float:
        """How long the last save took until it was on the disk, in seconds, as far as this rank knows."""
        return 0.0 if self._writing is None else self._writing.took_s

    @progress.phase(Phase.CHECKPOINT)
    def save(
        self,
        path: str | os.PathLike[str],
        tensors: Tensors,
        values: Any,
        *,
        keep: Keep,
        metric: Metric | None = None,
        claim: Claim | None = None,
    ) -> None:
        """Begin to write a checkpoint; every rank calls this with the same arguments.

        Args:
            path: a directory, or an fsspec address.
            tensors: arrays by group and name, equal on all ranks; they may change as soon as this returns.
            values: what JSON can hold.
            keep: which older checkpoints stay.
            metric: by which the best is told.
            claim: to the directory; rank 0 has it.

        Raises:
            CheckpointError: this one cannot be written, or the one before it could not be; on all ranks.
        """
        begin_s = time.monotonic()
        self.wait()
        waited_s = time.monotonic() - begin_s
        place = together(self._comm, lambda: storage(path))
        writers = self._number_of_writers(place)
        rank = self._comm.rank

        def copied() -> tuple[Pieces, Any]:
            pieces = share(tensors, rank, writers) if rank < writers else {}
            check_writable(pieces)
            return self._snapshot.take(pieces), plain(values) if rank == 0 else None

        pieces, copied_values = together(self._comm, copied)
        token = self._comm.broadcast_json(secrets.token_hex(8)) if writers > 1 else secrets.token_hex(8)
        if rank < writers:
            self._writing = _Writing(
                place, pieces, copied_values, keep=keep, metric=metric, claim=claim,
                token=token, rank=rank, writers=writers,
            )  # fmt: skip
        stall_s = time.monotonic() - begin_s
        self.stalls_s.append(stall_s)
        log.info(
            "checkpoint to %s: training stood still for %.1f ms, %.1f ms of them for the one before",
            place.place, stall_s * 1e3, waited_s * 1e3,
        )  # fmt: skip

    @progress.phase(Phase.CHECKPOINT)
    def wait(self) -> None:
        """Wait until what was saved last is on the disk; every rank calls this.

        Raises:
            CheckpointError: it could not be written; on all ranks.
        """
        if self._comm.world_size == 1 and self._writing is not None:
            self._writing.join()
        begin_s, has_warned = time.monotonic(), False
        while not self._is_done():
            if not has_warned and time.monotonic() - begin_s > _WARN_S:
                has_warned = True
                log.warning("waiting for more than %.0f s until a checkpoint is on the disk", _WARN_S)
        self._writing = None

    def _is_done(self) -> bool:
        """Return whether all ranks have written; raise on all if one could not."""
        writing = self._writing
        if writing is not None:
            writing.join(_ROUND_S)
        error = None if writing is None else writing.error
        found = self._comm.all_gather_json([writing is None or not writing.is_alive(), error and str(error)])
        failures = [(rank, text) for rank, (_, text) in enumerate(found) if text]
        if not failures:
            return all(is_done for is_done, _ in found)
        if writing is not None:
            writing.cancel()
            writing.join()
        self._writing = None
        rank, text = failures[0]
        if error is not None and rank == self._comm.rank:
            raise error
        raise CheckpointError(f"rank {rank} of {self._comm.world_size}: {text}")

    def leave(self, failure: BaseException) -> None:
        """Wait for this rank's write, because training ends with `failure`, to which an error of it becomes a note."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        writing.join(_LAST_S)
        writing.cancel()  # it may wait for a rank that is no more
        writing.join()
        if writing.error is not None:
            failure.add_note(f"besides, {writing.error}")

    def give_up(self) -> None:
        """Wait no longer for other ranks, of which one is lost: the next save begins anew, among those left."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.cancel()
            writing.join()
        self._writers.clear()

    def _number_of_writers(self, place: Storage) -> int:
        """Return how many ranks write to `place`: all that see it, if all do."""
        if self._comm.world_size > 1 and place.place not in self._writers:
            token = self._comm.broadcast_json(secrets.token_hex(8))
            together(self._comm, lambda: place.leave_token(token) if self._comm.rank == 0 else None)
            sees = all(self._comm.all_gather_json(place.sees_token(token)))
            if self._comm.rank == 0:
                place.remove_token(token)
            self._writers[place.place] = self._comm.world_size if sees else 1
        return self._writers.get(place.place, 1)


class _Writing(threading.Thread):
    """A checkpoint that is being written; not a daemon: the interpreter does not end before it has."""

    def __init__(self, place: Storage, pieces: Pieces, values: Any, **how: Any) -> None:
        super().__init__(name="checkpoint writer")
        self._what = (place, pieces, values)
        self._how = how
        self._cancelled = threading.Event()
        self._begin_s = time.monotonic()
        self.error: CheckpointError | None = None
        self.took_s = 0.0
        self.start()

    def run(self) -> None:
        try:
            name = write_pieces(*self._what, **self._how, cancelled=self._cancelled)
        except CancelledError:
            return
        except CheckpointError as error:
            self.error = error
            return
        except BaseException as error:  # a thread has nobody above it
            self.error = CheckpointError(f"{self._what[0].place}: writing a checkpoint failed: {error!r}")
            self.error.__cause__ = error
            return
        self.took_s = time.monotonic() - self._begin_s
        log.info("checkpoint %s/%s written in %.3f s", self._what[0].place, name, self.took_s)

    def cancel(self) -> None:
        """Wait for no other rank any more."""
        self._cancelled.set()


@progress.phase(Phase.CHECKPOINT)
def write(comm: Communicator, path: str | os.PathLike[str], tensors: Tensors, values: Any) -> None:
    """Save a checkpoint of what rank 0 holds; when this returns it is on the disk.

    Raises:
        CheckpointError: it could not be written; on all ranks.
    """
    together(comm, lambda: checkpoint.save(path, tensors, values) if comm.rank == 0 else None)


@progress.phase(Phase.CHECKPOINT)
def read(comm: Communicator, path: str | os.PathLike[str], *, is_ours: bool = False) -> Checkpoint | None:
    """Return on all ranks the newest whole checkpoint that rank 0 finds under `path`.

    Args:
        comm: the ranks.
        path: as in `checkpoint.load`; only rank 0 needs to see it.
        is_ours: whether the directory is this run's: there may be no checkpoint in it yet, which makes this None, and
            what is damaged is set aside.

    Raises:
        CheckpointError: it could not be read; on all ranks.
    """

    def load() -> Checkpoint | None:
        if comm.rank != 0 or (is_ours and not checkpoint.exists(path)):
            return None
        found = checkpoint.load(path)
        if is_ours:
            _set_damaged_aside(path, found)
        return found

    return shared(comm, together(comm, load))


def _set_damaged_aside(path: str | os.PathLike[str], found: Checkpoint) -> None:
    """Set aside what is newer than `found`, and damaged: as one of the newest it would stay, and a whole one go."""
    *_, newest = storage(path).numbers().values()
    if not found.place.endswith(f"/{newest}"):
        try:
            repair(path, log.warning)
        except CheckpointError as error:
            log.warning("%s", error)


def shared(comm: Communicator, found: Checkpoint | None, source: int = 0) -> Checkpoint | None:
    """Return on all ranks what rank `source` has found, which may be nothing; every rank calls this."""
    if comm.rank != source:
        found = None
    header = comm.broadcast_json(None if found is None else _header(found), source)
    if header is None:
        return None
    if found is None:
        place, values, layout = header
        tensors = {g: {n: np.empty(shape, dtype) for n, dtype, shape in arrays} for g, arrays in layout}
        found = Checkpoint(place=place, values=values, tensors=tensors)
    for arrays in found.tensors.values():
        for name in arrays:
            arrays[name] = comm.broadcast(np.array(arrays[name]), source)
    return found


def understood(saved: Checkpoint, action: Callable[[], T]) -> T:
    """Return what `action` makes of the values of a checkpoint, which may be any.

    Raises:
        CheckpointError: they are not such as disttrain saves.
    """
    try:
        return action()
    except DisttrainError:
        raise
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise CheckpointError(f"{saved.place} does not hold what is looked for in it: {error!r}") from error


def _header(found: Checkpoint) -> list[Any]:
    layout = [[g, [[n, str(a.dtype), a.shape] for n, a in arrays.items()]] for g, arrays in found.tensors.items()]
    return [found.place, found.values, layout]
