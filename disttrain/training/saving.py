"""Checkpoints among ranks: rank 0 reads and writes, and all ranks get the same, errors included."""

import os
from typing import Any

import numpy as np

from disttrain import checkpoint, progress
from disttrain.checkpoint import Checkpoint
from disttrain.comm import Communicator
from disttrain.progress import Phase
from disttrain.training.agreement import together


@progress.phase(Phase.CHECKPOINT)
def write(comm: Communicator, path: str | os.PathLike[str], tensors: checkpoint.format.Tensors, values: Any) -> None:
    """Save a checkpoint of what rank 0 holds; when this returns it is on the disk.

    Raises:
        CheckpointError: it could not be written; on all ranks.
    """
    together(comm, lambda: checkpoint.save(path, tensors, values) if comm.rank == 0 else None)


@progress.phase(Phase.CHECKPOINT)
def read(comm: Communicator, path: str | os.PathLike[str], *, may_be_missing: bool = False) -> Checkpoint | None:
    """Return on all ranks the newest whole checkpoint that rank 0 finds under `path`.

    Args:
        comm: the ranks.
        path: as in `checkpoint.load`; only rank 0 needs to see it.
        may_be_missing: return None, rather than raise, where there is no checkpoint.

    Raises:
        CheckpointError: it could not be read; on all ranks.
    """

    def load() -> Checkpoint | None:
        if comm.rank != 0 or (may_be_missing and not checkpoint.exists(path)):
            return None
        return checkpoint.load(path)

    found = together(comm, load)
    header = comm.broadcast_json(None if found is None else _header(found))
    if header is None:
        return None
    if found is None:
        place, values, layout = header
        tensors = {g: {n: np.empty(shape, dtype) for n, dtype, shape in arrays} for g, arrays in layout}
        found = Checkpoint(place=place, values=values, tensors=tensors)
    for arrays in found.tensors.values():
        for name in arrays:
            arrays[name] = comm.broadcast(np.array(arrays[name]))
    return found


def _header(found: Checkpoint) -> list[Any]:
    layout = [[g, [[n, str(a.dtype), a.shape] for n, a in arrays.items()]] for g, arrays in found.tensors.items()]
    return [found.place, found.values, layout]
