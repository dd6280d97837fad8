"""Looking at checkpoints without loading them, and putting a place in order."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from disttrain.checkpoint.format import MANIFEST, Manifest, Read, check, decode, decode_manifest
from disttrain.checkpoint.storage import Storage, storage
from disttrain.errors import CheckpointDamagedError, CheckpointError

Path = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A checkpoint in its place.

    Attributes:
        name: in the place; empty if the place itself is one.
        manifest: None where it cannot be read.
        damage: what is wrong, by file; empty: nothing was found.
        unknown: why it cannot be read although it may be whole, as that of a newer version; empty: it can be.
    """

    name: str
    manifest: Manifest | None
    damage: dict[str, str]
    unknown: str = ""

    @property
    def size(self) -> int:
        """Bytes of its tensors' files, as its manifest says."""
        return sum(file.size for file in self.manifest.files) if self.manifest else 0

    @property
    def is_whole(self) -> bool:
        """Whether it could be loaded, as far as was looked."""
        return not self.damage and not self.unknown


def entries(path: Path, *, thoroughly: bool) -> list[Entry]:
    """Return the checkpoints in `path`, the newest last, or the one that `path` itself is.

    Args:
        path: a directory, or an fsspec address.
        thoroughly: whether to read all files and compare their hashes, not only manifests.

    Raises:
        CheckpointError: there is none.
    """
    place = storage(path)
    names = [""] if place.has_file(MANIFEST) else list(place.numbers().values())
    if not names:
        raise CheckpointError(f"{place.place}: there is no checkpoint here")
    return [_entry(place, name, thoroughly) for name in names]


def differences(a: dict[str, dict[str, Any]], b: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return how the tensors `b`, by group and name, differ from `a`: an entry for each whose bits are not the same.

    Each has ``tensor``, and ``only`` (1 or 2), or ``kinds`` (both dtypes and shapes), or ``elements`` (how many
    differ), ``of`` (how many), ``largest`` (of the absolute differences; None where one is not finite) and ``relative``
    (the norm of the difference over that of `a`).
    """
    ours, theirs = _flat(a), _flat(b)
    found: list[dict[str, Any]] = []
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs:
            found.append({"tensor": name, "only": 1 if name in ours else 2})
            continue
        one, two = ours[name], theirs[name]
        if one.shape != two.shape or one.dtype != two.dtype:
            kinds = [f"{each.dtype} {list(each.shape)}" for each in (one, two)]
            found.append({"tensor": name, "kinds": kinds})
        elif one.tobytes() != two.tobytes():
            found.append({"tensor": name, **_distance(one, two)})
    return found


def repair(path: str | os.PathLike[str], say: Callable[[str], object]) -> int:
    """Remove what is half-written in `path`, set aside what is damaged, and return how many things that were.

    Nothing that is whole is touched, nor what a newer version may be able to read.

    Args:
        path: a directory, or an fsspec address.
        say: is told of each.

    Raises:
        CheckpointError: the place cannot be written to, or another process is writing there.
    """
    place = storage(path)
    if not place.names() and not place.leftovers():
        raise CheckpointError(f"{place.place}: there is no checkpoint here")
    try:
        leftovers = place.leftovers()
        with place.lock():  # with it these are removed: who holds it finds only what nobody writes any more
            for name in leftovers:
                place.remove_leftover(name)
                say(f"{name}: half-written or half-removed, removed")
            damaged = [e for n in place.numbers().values() if (e := _entry(place, n, True)).damage]
            for entry in damaged:
                aside = place.set_aside(entry.name)
                say(f"{entry.name}: damaged, set aside as {aside}: {'; '.join(entry.damage.values())}")
    except OSError as error:
        raise CheckpointError(f"{place.place}: cannot be repaired: {error.strerror or error}") from error
    return len(leftovers) + len(damaged)


def _entry(place: Storage, name: str, thoroughly: bool) -> Entry:
    read = reader(place, name)
    try:
        manifest = decode_manifest(read)
    except CheckpointDamagedError as error:
        return Entry(name=name, manifest=None, damage={MANIFEST: str(error)})
    except CheckpointError as error:
        return Entry(name=name, manifest=None, damage={}, unknown=str(error))
    damage: dict[str, str] = {}
    for file in manifest.files if thoroughly else ():
        try:
            check(read, file)
        except CheckpointDamagedError as error:
            damage[file.name] = str(error)
    if thoroughly and not damage:
        try:
            decode(read, manifest)
        except CheckpointDamagedError as error:  # its hashes are right, and it is none all the same
            damage[MANIFEST] = str(error)
    return Entry(name=name, manifest=manifest, damage=damage)


def reader(place: Storage, name: str) -> Read:
    """Return what reads the files of the checkpoint `name`."""
    prefix = f"{name}/" if name else ""
    return lambda file, limit: place.read(prefix + file, limit)


def _flat(tensors: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{group}:{name}": array for group, arrays in tensors.items() for name, array in arrays.items()}


def _distance(one: Any, two: Any) -> dict[str, Any]:
    wide = np.complex128 if one.dtype.kind == "c" else np.float64
    differs = (_bits(one) != _bits(two)).any(axis=1)
    with np.errstate(all="ignore"):  # infinities
        a, b = (each.reshape(-1).astype(wide) for each in (one, two))
        difference = np.where(differs, np.abs(b - a), 0)  # of equal infinities it would be NaN
        largest, norm = float(difference.max()), float(np.linalg.norm(a))
        relative = float(np.linalg.norm(difference)) / norm if norm else None
    return {
        "elements": int(differs.sum()),
        "of": int(one.size),
        "largest": largest if np.isfinite(largest) else None,
        "relative": None if relative is None or not np.isfinite(relative) else relative,
    }


def _bits(array: Any) -> Any:
    return array.reshape(-1).view(np.uint8).reshape(array.size, array.itemsize)
