"""Writing a checkpoint: each rank its pieces, and rank 0 the manifest when all others have theirs on the disk.

Ranks that write together meet in the draft: they look for it, and leave in it a note of what they wrote. They send each
other nothing, so that all of it can go on beside the training.
"""

import errno
import hashlib
import json
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from disttrain.backend import Array
from disttrain.checkpoint.disk import Bytes
from disttrain.checkpoint.format import (
    File,
    check_writable,
    decode_manifest,
    describe,
    encode,
    encode_manifest,
    file_name,
    plain,
)
from disttrain.checkpoint.keeping import Keep, Metric
from disttrain.checkpoint.pieces import Piece, Pieces, share
from disttrain.checkpoint.storage import Claim, Storage
from disttrain.errors import CheckpointError

_LOOK_S = 0.002  # how often a rank looks for what another writes
_DRAFT_TIMEOUT_S = 90.0  # longer than the lock is waited for
_NOTE_BYTES = 1 << 26


class CancelledError(CheckpointError):
    """Writing was given up, because another rank could not write its part."""


def write(
    place: Storage,
    pieces: Pieces,
    values: Any = None,
    *,
    keep: Keep,
    metric: Metric | None = None,
    claim: Claim | None = None,
    token: str = "",
    rank: int = 0,
    writers: int = 1,
    cancelled: threading.Event | None = None,
) -> str:
    """Write a checkpoint, or this rank's part of it, and return its name; on rank 0 it is then there, whole.

    Args:
        place: where.
        pieces: what this rank writes.
        values: what JSON can hold; those of rank 0 count.
        keep: which older ones stay.
        metric: by which the best is told.
        claim: of the run that writes, if it has one.
        token: known to those who write together, and to nobody else.
        rank: of the one that calls this, among those who write together.
        writers: how many these are.
        cancelled: set when it is no longer of use.

    Raises:
        CheckpointError: names the place and what the system said; what was there before still is.
    """
    check_writable(pieces)
    values = plain(values)
    token, cancelled = token or secrets.token_hex(8), cancelled or threading.Event()
    try:
        if rank > 0:
            return _write_part(place, pieces, token, rank, cancelled)
        with place.lock():
            if claim is not None:
                claim.check()
            known = place.numbers()
            number = max(known, default=0) + 1
            name = f"checkpoint-{number:06d}"
            try:
                folder = place.make_draft(token, name)
                files = _write_files(place, folder, pieces, None if writers == 1 else 0)
                for other in range(1, writers):
                    files += _await_note(place, folder, token, other, cancelled)
                if claim is not None:
                    claim.check()
                about: dict[str, Any] = {"written": time.strftime("%Y-%m-%d %H:%M:%S %z")}  # for people to read
                if metric is not None:
                    about["metric"] = asdict(metric)
                place.commit(token, name, encode_manifest(files, values, about))
            except BaseException:
                place.discard(token)
                raise
            metrics = {n: m for n, each in known.items() if (m := metric_of(place, each))} if keep.best else {}
            if metric is not None:
                metrics[number] = metric
            for old in keep.removable([*known, number], metrics):
                place.remove(known[old])
        return name
    except OSError as error:
        raise _unwritten(place, pieces, error) from error


def metric_of(place: Storage, name: str) -> Metric | None:
    """Return the metric of the checkpoint `name`, None where it has none, or none that can be read."""
    try:
        manifest = decode_manifest(lambda file, limit: place.read(f"{name}/{file}", limit))
        metric = Metric(**manifest.about["metric"])
        return metric if isinstance(metric.value, float) else None
    except (CheckpointError, KeyError, TypeError):
        return None


def whole(tensors: Mapping[str, Mapping[str, Array]]) -> Pieces:
    """Return all of `tensors`, as one writer writes them."""
    return share(tensors, 0, 1)


def _write_part(place: Storage, pieces: Pieces, token: str, rank: int, cancelled: threading.Event) -> str:
    end_s = time.monotonic() + _DRAFT_TIMEOUT_S
    while (folder := place.find_draft(token)) is None:
        if time.monotonic() > end_s:
            raise CheckpointError(f"{place.place}: rank 0 has begun no checkpoint here for {_DRAFT_TIMEOUT_S:.0f} s")
        _pause(place, cancelled)
    files = _write_files(place, folder, pieces, rank)
    note = json.dumps([asdict(file) for file in files]).encode()
    # the hash comes with it: half a note is none
    place.write(f"{folder}/{_note(token, rank)}", [hashlib.sha256(note).hexdigest().encode(), note])
    return folder


def _write_files(place: Storage, folder: str, pieces: Pieces, part: int | None) -> list[File]:
    names = {group: file_name(group, part) for group in pieces}
    return [_write_file(place, folder, names[group], held) for group, held in pieces.items()]


def _write_file(place: Storage, folder: str, name: str, pieces: Mapping[str, Piece]) -> File:
    sha, size = hashlib.sha256(), 0

    def counted() -> Iterator[Bytes]:
        nonlocal size
        for chunk in encode(pieces):
            sha.update(chunk)
            size += len(chunk)
            yield chunk

    place.write(f"{folder}/{name}", counted())
    return describe(name, size, sha.hexdigest(), pieces)


def _await_note(place: Storage, folder: str, token: str, rank: int, cancelled: threading.Event) -> list[File]:
    """Return what `rank` says that it has written, once it says so."""
    name = f"{folder}/{_note(token, rank)}"
    while True:
        if place.has_file(name):
            content = place.read(name, _NOTE_BYTES)
            if hashlib.sha256(content[64:]).hexdigest().encode() == content[:64]:
                break
        _pause(place, cancelled)
    place.remove_file(name)
    return [File(**each) for each in json.loads(content[64:])]


def _note(token: str, rank: int) -> str:
    return f"part-{token}-{rank}.json"


def _pause(place: Storage, cancelled: threading.Event) -> None:
    if cancelled.wait(_LOOK_S):
        raise CancelledError(f"{place.place}: a checkpoint was given up, because another rank could not write its part")


def _unwritten(place: Storage, pieces: Pieces, error: OSError) -> CheckpointError:
    size = sum(piece.array.nbytes for held in pieces.values() for piece in held.values())
    room = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = place.free_bytes()
        room = "" if free is None else f" ({free} bytes are free)"
    return CheckpointError(
        f"{place.place}: a checkpoint of {size} bytes could not be written: {error.strerror or error}{room}; "
        "those written before are untouched"
    )
