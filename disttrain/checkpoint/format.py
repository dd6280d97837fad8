"""What a checkpoint is: safetensors files, and a manifest with shapes, dtypes and a hash of every file.

A group of tensors is a file, or several of which each holds pieces. Nothing in them is executed when they are read,
and sizes are compared before memory is taken.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as decode_tensors

from disttrain.backend import Array, to_host
from disttrain.checkpoint.pieces import Piece, Pieces
from disttrain.errors import CheckpointDamagedError, CheckpointError

MANIFEST = "manifest.json"
_FORMAT = "disttrain checkpoint"
_VERSION = 1
_MANIFEST_BYTES = 1 << 26  # larger ones are not ours
_FILE_NAME = re.compile(r"([a-z][a-z0-9_]{0,63})(\.\d{1,6})?\.safetensors")
_CHUNK_BYTES = 1 << 22
_DTYPES = {  # the widest first: in this order tensors follow one another, so that each is aligned
    np.dtype(name): code
    for name, code in (
        ("uint64", "U64"), ("int64", "I64"), ("float64", "F64"), ("complex64", "C64"), ("float32", "F32"),
        ("uint32", "U32"), ("int32", "I32"), ("float16", "F16"), ("uint16", "U16"), ("int16", "I16"), ("int8", "I8"),
        ("uint8", "U8"), ("bool", "BOOL"),
    )
}  # fmt: skip

Tensors = Mapping[str, Mapping[str, Array]]  # by group and by name
Read = Callable[[str, int], bytes]  # of a file: its name, and the largest size it may have


@dataclass(frozen=True, kw_only=True)
class File:
    """A file of tensors, as a manifest describes it.

    Attributes:
        name: of the file.
        size: in bytes.
        sha256: of its content, in hexadecimal digits.
        tensors: for each tensor or piece its ``dtype`` and ``shape``; for a piece also ``of``, the shape of the whole,
            and ``start``, its first element in the flat whole.
    """

    name: str
    size: int
    sha256: str
    tensors: dict[str, Any]

    @property
    def group(self) -> str:
        """The group that the tensors belong to."""
        return self.name.partition(".")[0]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a manifest says.

    Attributes:
        files: of tensors.
        values: what was saved beside them.
        about: of the checkpoint itself: when it was ``written``, and its ``metric``, by which the best is told, if any.
    """

    files: list[File]
    values: Any
    about: dict[str, Any]


def file_name(group: str, part: int | None = None) -> str:
    """Return the name of the file of a group, or of a part of it.

    Raises:
        CheckpointError: a group cannot have this name.
    """
    name = f"{group}.safetensors" if part is None else f"{group}.{part}.safetensors"
    if not _FILE_NAME.fullmatch(name):
        raise CheckpointError(f"a group of tensors is named by small letters, digits and '_', not {group!r}")
    return name


def check_writable(pieces: Pieces) -> None:
    """Do nothing if `pieces` can be written.

    Raises:
        CheckpointError: a group cannot have its name, or an array is not of numbers.
    """
    for group, held in pieces.items():
        file_name(group)
        for name, piece in held.items():
            if piece.array.dtype not in _DTYPES:
                raise CheckpointError(
                    f"the tensors of {group!r} cannot be saved: {name!r} has the dtype {piece.array.dtype}; "
                    f"expected one of {', '.join(map(str, _DTYPES))}"
                )


def encode(pieces: Mapping[str, Piece]) -> Iterator[memoryview]:
    """Yield the bytes of a safetensors file of `pieces`, as the library of that name writes them, without copying."""
    arrays = {name: _contiguous(piece.array) for name, piece in pieces.items()}
    order = sorted(arrays, key=lambda name: (list(_DTYPES).index(arrays[name].dtype), name))
    header, start = {}, 0
    for name in order:
        array, stop = arrays[name], start + arrays[name].nbytes
        code = _DTYPES[array.dtype]
        header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in order:
        data = arrays[name].reshape(-1).view(np.uint8).data
        for begin in range(0, len(data), _CHUNK_BYTES):
            yield data[begin : begin + _CHUNK_BYTES]


def describe(name: str, size: int, sha256: str, pieces: Mapping[str, Piece]) -> File:
    """Return what a manifest says of the file `name` of `pieces`."""
    return File(name=name, size=size, sha256=sha256, tensors={n: piece.description() for n, piece in pieces.items()})


def encode_manifest(files: list[File], values: Any, about: Mapping[str, Any]) -> bytes:
    """Return the content of a manifest; `values` as `plain` makes them."""
    listed = {f.name: {"bytes": f.size, "sha256": f.sha256, "tensors": f.tensors} for f in files}
    body = {"format": _FORMAT, "version": _VERSION, "about": dict(about), "files": listed, "values": values}
    body = json.loads(json.dumps(body))  # as it will be read: keys are texts, and sorted as such
    return _text({"sha256": hashlib.sha256(_canonical(body)).hexdigest(), "body": body})


def plain(values: Any) -> Any:
    """Return a copy of `values` as they will be read: tuples as lists, keys as texts.

    Raises:
        CheckpointError: `values` holds something that JSON cannot.
    """
    try:
        return json.loads(json.dumps(values))
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"a checkpoint holds numbers, texts, lists and dicts beside its tensors; this is something else: {error}"
        ) from error


def decode_manifest(read: Read) -> Manifest:
    """Return what the manifest says, after checking its hash.

    Raises:
        CheckpointDamagedError: it is not as it was written.
        CheckpointError: it is of another version.
    """
    body = _body(read(MANIFEST, _MANIFEST_BYTES))
    try:
        files = [
            File(name=name, size=int(d["bytes"]), sha256=str(d["sha256"]), tensors=dict(d["tensors"]))
            for name, d in dict(body["files"]).items()
        ]
        about = dict(body.get("about", {}))
        if not all(isinstance(each, dict) for file in files for each in file.tensors.values()):
            raise TypeError("a tensor is described by a dict")
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise CheckpointDamagedError(f"{MANIFEST}: not a manifest: {_short(error)}") from error
    for file in files:
        if not _FILE_NAME.fullmatch(file.name):
            raise CheckpointDamagedError(
                f"{MANIFEST} names a file {file.name[:80]!r}, which is not one of a checkpoint"
            )
    return Manifest(files=files, values=body.get("values"), about=about)


def check(read: Read, file: File) -> bytes:
    """Return the content of `file`, after checking its hash.

    Args:
        read: raises CheckpointDamagedError if the file is larger than it may be, or not there.
        file: as the manifest describes it.

    Raises:
        CheckpointDamagedError: names the file and what is wrong with it.
    """
    content = read(file.name, file.size)
    found = hashlib.sha256(content).hexdigest()
    if found != file.sha256:
        raise CheckpointDamagedError(
            f"{file.name}: its SHA-256 is {found[:16]}..., the manifest says {file.sha256[:16]}...; "
            f"the file was changed after it was written ({len(content)} of {file.size} bytes are there)"
        )
    return content


def decode(read: Read, manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Return tensors by group and name, after checking every hash.

    Raises:
        CheckpointDamagedError: names the file and what is wrong with it.
    """
    tensors: dict[str, dict[str, Any]] = {}
    pieces: dict[tuple[str, str], list[tuple[Any, Any, Any]]] = {}
    for file in manifest.files:
        content = check(read, file)
        group = tensors.setdefault(file.group, {})
        try:
            arrays = decode_tensors(content)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:  # the latter: a dtype that NumPy lacks
            raise CheckpointDamagedError(f"{file.name}: not a safetensors file: {error}") from error
        for name, array in arrays.items():
            described = file.tensors.get(name)
            if isinstance(described, dict) and "of" in described:
                pieces.setdefault((file.group, name), []).append((described.get("start"), described["of"], array))
            elif name in group:
                raise CheckpointDamagedError(f"{file.name}: holds {name!r}, which another file holds as well")
            else:
                group[name] = array
    for (of_group, name), parts in pieces.items():
        if name in tensors[of_group]:
            raise CheckpointDamagedError(f"{MANIFEST}: of {name!r} there are pieces, and the whole")
        tensors[of_group][name] = _joined(name, parts)
    return tensors


def digest(tensors: Mapping[str, Array]) -> str:
    """Return the SHA-256 of all `tensors`, in order of their names: of names, dtypes, shapes and values."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        array = _contiguous(tensors[name])
        sha.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        sha.update(array.data if array.size else b"")
    return sha.hexdigest()


def _joined(name: str, parts: list[tuple[Any, Any, Any]]) -> Any:
    """Return the whole of which `parts` are the pieces: first element, shape of the whole, array."""
    wrong = CheckpointDamagedError(f"{MANIFEST}: the pieces of {name!r} do not make a whole")
    shape = parts[0][1]
    if not isinstance(shape, list) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise wrong
    if not all(isinstance(start, int) and of == shape and a.ndim == 1 for start, of, a in parts):
        raise wrong
    parts = sorted(parts, key=lambda part: (part[0], part[2].size))
    end = 0
    for start, _, array in parts:
        if start != end or array.dtype != parts[0][2].dtype:
            raise wrong
        end += array.size
    if end != math.prod(shape):  # of what was read, so that no memory is taken for what is not there
        raise wrong
    return np.concatenate([array for _, _, array in parts]).reshape(shape)


def _body(content: bytes) -> Any:
    try:
        manifest = json.loads(content.decode())  # of bytes, json would guess the encoding
        body, expected = manifest["body"], manifest["sha256"]
        found = hashlib.sha256(_canonical(body)).hexdigest()
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointDamagedError(f"{MANIFEST}: not a manifest: {_short(error)}") from error
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


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]  # it may quote all of a file


def _canonical(body: Any) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def _text(manifest: Any) -> bytes:
    return json.dumps(manifest, indent=1).encode()


def _contiguous(array: Array) -> np.ndarray[Any, Any]:
    """Return `array` on the host and in C order; unlike `np.ascontiguousarray` it keeps the shape ``()``."""
    return np.asarray(to_host(array), order="C")
