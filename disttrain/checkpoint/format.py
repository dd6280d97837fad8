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
        values: whatever JSON can hold.

    Raises:
        CheckpointError: `values` holds something that JSON cannot.
    """
    files: dict[str, bytes] = {}
    described: dict[str, Any] = {}
    for group, arrays in tensors.items():
        host = {name: np.ascontiguousarray(to_host(array)) for name, array in arrays.items()}
        name = f"{group}.safetensors"
        files[name] = encode_tensors(host)
        described[name] = {
            "bytes": len(files[name]),
            "sha256": hashlib.sha256(files[name]).hexdigest(),
            "tensors": {n: {"dtype": str(a.dtype), "shape": list(a.shape)} for n, a in host.items()},
        }
    body = {"format": _FORMAT, "version": _VERSION, "files": described, "values": values}
    try:
        text = _canonical(body)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"a checkpoint holds numbers, texts, lists and dicts beside its tensors; this is something else: {error}"
        ) from error
    manifest = {"sha256": hashlib.sha256(text).hexdigest(), "body": body}
    files[MANIFEST] = json.dumps(manifest, indent=1).encode()
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
    for name, described in body["files"].items():
        if not _FILE_NAME.fullmatch(name):
            raise CheckpointDamagedError(f"the manifest names a file {name[:80]!r}, which is not one of a checkpoint")
        content = read(name, described["bytes"])
        found = hashlib.sha256(content).hexdigest()
        if found != described["sha256"]:
            raise CheckpointDamagedError(
                f"{name}: its SHA-256 is {found[:16]}..., the manifest says {described['sha256'][:16]}...; "
                f"the file was changed after it was written ({len(content)} of {described['bytes']} bytes are there)"
            )
        try:
            tensors[name.removesuffix(".safetensors")] = decode_tensors(content)
        except SafetensorError as error:
            raise CheckpointDamagedError(f"{name}: not a safetensors file: {error}") from error
    return tensors, body["values"]


def digest(tensors: Mapping[str, Array]) -> str:
    """Return the SHA-256 of all `tensors`, in order of their names: of names, dtypes, shapes and values."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        array = np.ascontiguousarray(to_host(tensors[name]))
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
    if body.get("format") != _FORMAT or body.get("version") != _VERSION:
        raise CheckpointError(
            f"{MANIFEST}: format {body.get('format')!r} version {body.get('version')!r}; this version of disttrain "
            f"reads {_FORMAT!r} version {_VERSION}"
        )
    return body


def _canonical(body: Any) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
