"""What a checkpoint is: safetensors files, and a manifest with shapes, dtypes and a hash of every file.

Nothing in it is executed when it is read, and sizes are compared before memory is taken.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as decode_tensors
from safetensors.numpy import save as encode_tensors

from disttrain.backend import Array, to_host
from disttrain.errors import CheckpointDamagedError, CheckpointError

MANIFEST = "manifest.json"
_FORMAT = "disttrain checkpoint"
_VERSION = 1
_MANIFEST_BYTES = 1 << 26  # larger ones are not ours
_FILE_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}\.safetensors")

Tensors = Mapping[str, Mapping[str, Array]]  # by file and by name


def encode(tensors: Tensors, values: Any) -> dict[str, bytes]:
    """Return the files of a checkpoint by name, the manifest last.

    Args:
        tensors: arrays by group and name; a group becomes a file.
        values: whatever JSON can hold, and numbers that are not finite.

    Raises:
        CheckpointError: `values` holds something that JSON cannot, or an array is not of numbers.
    """
    files: dict[str, bytes] = {}
    described: dict[str, Any] = {}
    for group, arrays in tensors.items():
        name = f"{group}.safetensors"
        if not _FILE_NAME.fullmatch(name):
            raise CheckpointError(f"a group of tensors is named by small letters, digits and '_', not {group!r}")
        host = {n: _contiguous(array) for n, array in arrays.items()}
        try:
            files[name] = encode_tensors(host)
        except SafetensorError as error:
            raise CheckpointError(f"the tensors of {group!r} cannot be saved: {error}") from error
        described[name] = {
            "bytes": len(files[name]),
            "sha256": hashlib.sha256(files[name]).hexdigest(),
            "tensors": {n: {"dtype": str(a.dtype), "shape": list(a.shape)} for n, a in host.items()},
        }
    body = {"format": _FORMAT, "version": _VERSION, "files": described, "values": values}
    try:
        body = json.loads(json.dumps(body))  # as it will be read: keys are texts, and sorted as such
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"a checkpoint holds numbers, texts, lists and dicts beside its tensors; this is something else: {error}"
        ) from error
    files[MANIFEST] = _text({"sha256": hashlib.sha256(_canonical(body)).hexdigest(), "body": body})
    return files


def decode(read: Callable[[str, int], bytes]) -> tuple[dict[str, dict[str, Any]], Any]:
    """Return tensors by group and name, and the values, after checking every hash.

    Args:
        read: returns the content of a file, given its name and the largest size it may have; raises
            CheckpointDamagedError if it is larger or not there.

    Raises:
        CheckpointDamagedError: names the file and what is wrong with it.
    """
    body = _manifest(read(MANIFEST, _MANIFEST_BYTES))
    tensors: dict[str, dict[str, Any]] = {}
    for name, size, expected in _files(body):
        if not _FILE_NAME.fullmatch(name):
            raise CheckpointDamagedError(f"the manifest names a file {name[:80]!r}, which is not one of a checkpoint")
        content = read(name, size)
        found = hashlib.sha256(content).hexdigest()
        if found != expected:
            raise CheckpointDamagedError(
                f"{name}: its SHA-256 is {found[:16]}..., the manifest says {expected[:16]}...; "
                f"the file was changed after it was written ({len(content)} of {size} bytes are there)"
            )
        try:
            tensors[name.removesuffix(".safetensors")] = decode_tensors(content)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:  # the latter: a dtype that NumPy lacks
            raise CheckpointDamagedError(f"{name}: not a safetensors file: {error}") from error
    return tensors, body.get("values")


def digest(tensors: Mapping[str, Array]) -> str:
    """Return the SHA-256 of all `tensors`, in order of their names: of names, dtypes, shapes and values."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        array = _contiguous(tensors[name])
        sha.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        sha.update(array.data if array.size else b"")
    return sha.hexdigest()


def _manifest(content: bytes) -> Any:
    try:
        manifest = json.loads(content)
        body, expected = manifest["body"], manifest["sha256"]
        found = hashlib.sha256(_canonical(body)).hexdigest()
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointDamagedError(f"{MANIFEST}: not a manifest: {error!r}") from error
    if found != expected:
        raise CheckpointDamagedError(
            f"{MANIFEST}: its content has the SHA-256 {found[:16]}..., it says {str(expected)[:16]}...; "
            "it was changed after it was written"
        )
    if _text(manifest) != content or not isinstance(body, dict):  # the same values, written otherwise
        raise CheckpointDamagedError(f"{MANIFEST}: not as it was written; it was changed since")
    if body.get("format") != _FORMAT or body.get("version") != _VERSION:
        raise CheckpointError(
            f"{MANIFEST}: format {body.get('format')!r} version {body.get('version')!r}; this version of disttrain "
            f"reads {_FORMAT!r} version {_VERSION}"
        )
    return body


def _files(body: dict[str, Any]) -> list[tuple[str, int, str]]:
    """Return name, size and SHA-256 of the files that a manifest lists."""
    try:
        return [(name, int(d["bytes"]), str(d["sha256"])) for name, d in dict(body["files"]).items()]
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise CheckpointDamagedError(f"{MANIFEST}: not a manifest: {error!r}") from error


def _canonical(body: Any) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def _text(manifest: Any) -> bytes:
    return json.dumps(manifest, indent=1).encode()


def _contiguous(array: Array) -> np.ndarray[Any, Any]:
    """Return `array` on the host and in C order; unlike `np.ascontiguousarray` it keeps the shape ``()``."""
    return np.asarray(to_host(array), order="C")
