"""Checkpoints: written as a whole or not at all, checked when read, free of world_size.

``save`` adds a numbered checkpoint to a directory; ``load`` gives the newest one that is whole. A damaged one
is named in a warning, and the one before it is used.
"""

import os
from dataclasses import dataclass
from typing import Any

from disttrain.checkpoint.format import MANIFEST, Tensors, decode, decode_manifest, digest
from disttrain.checkpoint.inspection import reader
from disttrain.checkpoint.keeping import Keep, Metric
from disttrain.checkpoint.storage import Storage, storage
from disttrain.checkpoint.writing import whole, write
from disttrain.errors import CheckpointDamagedError, CheckpointError
from disttrain.observe import log

__all__ = ["Checkpoint", "Keep", "Metric", "Tensors", "digest", "exists", "load", "save"]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What was read.

    Attributes:
        place: where it lies.
        tensors: arrays by group and name.
        values: what was saved beside them.
    """

    place: str
    tensors: dict[str, dict[str, Any]]
    values: Any


def save(path: str | os.PathLike[str], tensors: Tensors, values: Any, *, keep: int | Keep = 2) -> str:
    """Add a checkpoint to the directory `path`, which is made if need be, and return where it lies.

    When this returns, the checkpoint is on the disk, whole. Older ones that are not to be kept are removed.

    Args:
        path: a directory, or an fsspec address.
        tensors: arrays by group and name; each group becomes a safetensors file.
        values: whatever JSON can hold, and numbers that are not finite.
        keep: which checkpoints stay: as many of the newest, or a Keep.

    Raises:
        CheckpointError: names the path and what the system said; what was there before still is.
    """
    place = storage(path)
    name = write(place, whole(tensors), values, keep=keep if isinstance(keep, Keep) else Keep(last=keep))
    return f"{place.place}/{name}"


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Return the newest whole checkpoint in the directory `path`, or the one that `path` itself is.

    Raises:
        CheckpointError: there is none.
        CheckpointDamagedError: there are some, but none is whole; names each file that is wrong.
    """
    place = storage(path)
    if place.has_file(MANIFEST):
        return _load(place, "")
    damage: dict[str, str] = {}
    while names := [name for name in place.numbers().values() if name not in damage]:
        try:
            return _load(place, names[-1])
        except CheckpointDamagedError as error:
            if names[-1] in place.numbers().values():  # else a writer has removed it meanwhile
                damage[names[-1]] = str(error)
                log.warning("checkpoint damaged, trying the one before it: %s", error)
    if not damage:
        raise CheckpointError(f"{place.place}: there is no checkpoint here")
    raise CheckpointDamagedError(
        f"none of {len(damage)} checkpoints in {place.place} is whole: {'; '.join(damage.values())}"
    )


def exists(path: str | os.PathLike[str]) -> bool:
    """Return whether the directory `path` holds a checkpoint, whole or not, or is one."""
    place = storage(path)
    return place.has_file(MANIFEST) or bool(place.numbers())


def _load(place: Storage, name: str) -> Checkpoint:
    where, read = f"{place.place}/{name}".rstrip("/"), reader(place, name)
    try:
        manifest = decode_manifest(read)
        tensors = decode(read, manifest)
    except CheckpointDamagedError as error:
        raise CheckpointDamagedError(f"{where}: {error}") from error
    return Checkpoint(place=where, tensors=tensors, values=manifest.values)
