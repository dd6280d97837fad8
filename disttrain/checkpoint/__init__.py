"""Checkpoints: written as a whole or not at all, checked when read, free of world_size.

``save`` adds a numbered checkpoint to a directory; ``load`` gives the newest one that is whole. A damaged one
is named in a warning, and the one before it is used.
"""

import os
from dataclasses import dataclass
from typing import Any

from disttrain.checkpoint.format import MANIFEST, Tensors, decode, digest, encode
from disttrain.checkpoint.storage import Storage, storage
from disttrain.errors import CheckpointDamagedError, CheckpointError, ConfigError
from disttrain.observe import log

__all__ = ["Checkpoint", "digest", "exists", "load", "save"]


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


def save(path: str | os.PathLike[str], tensors: Tensors, values: Any, *, keep: int = 2) -> str:
    """Add a checkpoint to the directory `path`, which is made if need be, and return where it lies.

    When this returns, the checkpoint is on the disk, whole. Older ones than the newest `keep` are removed.

    Args:
        path: a directory, or an fsspec address.
        tensors: arrays by group and name; each group becomes a safetensors file.
        values: whatever JSON can hold, and numbers that are not finite.
        keep: how many checkpoints stay; two, so that a damaged one leaves one.

    Raises:
        CheckpointError: names the path and what the system said; what was there before still is.
    """
    if keep < 1:
        raise ConfigError(f"keep must be at least 1, not {keep}")
    files = encode(tensors, values)
    place = storage(path)
    try:
        with place.lock():
            known = place.numbers()
            name = f"checkpoint-{max(known, default=0) + 1:06d}"
            place.write(name, files)
            for old in list(known.values())[: max(0, len(known) + 1 - keep)]:
                place.remove(old)
    except OSError as error:
        size = sum(len(content) for content in files.values())
        raise CheckpointError(
            f"{place.place}: a checkpoint of {size} bytes could not be written: {error.strerror or error}; "
            "those written before are untouched"
        ) from error
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
    prefix = f"{name}/" if name else ""
    where = f"{place.place}/{name}".rstrip("/")
    try:
        tensors, values = decode(lambda file, limit: place.read(prefix + file, limit))
    except CheckpointDamagedError as error:
        raise CheckpointDamagedError(f"{where}: {error}") from error
    return Checkpoint(place=where, tensors=tensors, values=values)
