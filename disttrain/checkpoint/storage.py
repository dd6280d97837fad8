"""Where checkpoints lie: a directory of numbered ones, on a disk or behind any fsspec address.

A checkpoint is there as a whole or not at all. On a disk it is written under a temporary name, flushed, and
renamed. Elsewhere its manifest is written last, and without a manifest it does not count.
"""

import contextlib
import os
import re
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec
from filelock import FileLock, Timeout
from fsspec.implementations.local import LocalFileSystem

from disttrain.checkpoint.format import MANIFEST
from disttrain.errors import CheckpointDamagedError, CheckpointError

_NAME = re.compile(r"checkpoint-(\d{6,})")
_LOCK_TIMEOUT_S = 60.0


def storage(path: str | os.PathLike[str]) -> "Storage":
    """Return the storage that `path` names: a directory, or an fsspec address such as ``s3://bucket/run``."""
    try:
        filesystem, inner = fsspec.url_to_fs(os.fspath(path))
    except (ValueError, ImportError) as error:  # no such protocol, or its package is not here
        raise CheckpointError(f"{path}: neither a directory nor an address that fsspec can open: {error}") from error
    if isinstance(filesystem, LocalFileSystem):
        return _Directory(Path(inner))
    return _Remote(filesystem, inner)


class Storage(ABC):
    """Numbered checkpoints in one place."""

    place: str

    @abstractmethod
    def names(self) -> list[str]:
        """Return the entries of the place; an empty list if it does not exist."""

    @abstractmethod
    def has_file(self, name: str) -> bool:
        """Return whether the place itself holds a file `name`."""

    @abstractmethod
    def read(self, name: str, limit: int) -> bytes:
        """Return the content of a file, or raise CheckpointDamagedError if it is missing or above `limit` bytes."""

    @abstractmethod
    def write(self, name: str, files: Mapping[str, bytes]) -> None:
        """Write a checkpoint, durably and as a whole."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a checkpoint, so that it is never seen in part."""

    @abstractmethod
    def lock(self) -> contextlib.AbstractContextManager[Any]:
        """Keep other writers out of this place."""

    def numbers(self) -> dict[int, str]:
        """Return the numbers of the checkpoints with their names, ascending."""
        found = {int(m[1]): name for name in self.names() if (m := _NAME.fullmatch(name))}
        return dict(sorted(found.items()))


class _Directory(Storage):
    def __init__(self, root: Path) -> None:
        self.root = root
        self.place = str(root)

    def names(self) -> list[str]:
        return os.listdir(self.root) if self.root.is_dir() else []

    def has_file(self, name: str) -> bool:
        return (self.root / name).is_file()

    def read(self, name: str, limit: int) -> bytes:
        path = self.root / name
        try:
            # neither a link to elsewhere nor a pipe that never ends
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(descriptor, "rb") as file:
                size = os.fstat(descriptor).st_size
                if size > limit:
                    raise CheckpointDamagedError(f"{path}: {size} bytes, at most {limit} expected")
                return file.read(size)  # not `limit`: memory for it is taken at once
        except OSError as error:
            raise CheckpointDamagedError(f"{path}: cannot be read: {error.strerror}") from error

    def write(self, name: str, files: Mapping[str, bytes]) -> None:
        temporary = self.root / f".tmp-{secrets.token_hex(8)}"
        temporary.mkdir()
        try:
            for file_name, content in files.items():
                with open(temporary / file_name, "xb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            _sync(temporary)
            os.rename(temporary, self.root / name)
            _sync(self.root)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def remove(self, name: str) -> None:
        hidden = self.root / f".tmp-{secrets.token_hex(8)}"
        os.rename(self.root / name, hidden)
        shutil.rmtree(hidden, ignore_errors=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        new = not self.root.is_dir()
        self.root.mkdir(parents=True, exist_ok=True)
        if new:
            _sync(self.root.parent)
        try:
            with FileLock(self.root / ".lock", timeout=_LOCK_TIMEOUT_S):
                for name in self.names():
                    if name.startswith(".tmp-"):  # a writer ended in the middle: the lock is ours
                        shutil.rmtree(self.root / name, ignore_errors=True)
                yield
        except Timeout as error:
            raise CheckpointError(
                f"{self.root}: another process has been writing here for {_LOCK_TIMEOUT_S:.0f} s; "
                "give each run a directory of its own"
            ) from error


class _Remote(Storage):
    def __init__(self, filesystem: Any, root: str) -> None:
        self.filesystem = filesystem
        self.root = root.rstrip("/")
        self.place = str(filesystem.unstrip_protocol(self.root))

    def names(self) -> list[str]:
        if not self.filesystem.isdir(self.root):
            return []
        found = [str(path).rstrip("/").rsplit("/", 1)[-1] for path in self.filesystem.ls(self.root, detail=False)]
        return [name for name in found if self.has_file(f"{name}/{MANIFEST}")]

    def has_file(self, name: str) -> bool:
        return bool(self.filesystem.isfile(f"{self.root}/{name}"))

    def read(self, name: str, limit: int) -> bytes:
        path = f"{self.root}/{name}"
        try:
            size = self.filesystem.size(path)
            if size > limit:
                raise CheckpointDamagedError(f"{path}: {size} bytes, at most {limit} expected")
            return bytes(self.filesystem.cat_file(path))
        except OSError as error:
            raise CheckpointDamagedError(f"{path}: cannot be read: {error!r}") from error

    def write(self, name: str, files: Mapping[str, bytes]) -> None:
        self.filesystem.makedirs(f"{self.root}/{name}", exist_ok=True)
        for file_name, content in files.items():  # the manifest is the last
            self.filesystem.pipe_file(f"{self.root}/{name}/{file_name}", content)

    def remove(self, name: str) -> None:
        self.filesystem.rm_file(f"{self.root}/{name}/{MANIFEST}")
        self.filesystem.rm(f"{self.root}/{name}", recursive=True)

    def lock(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()  # object stores have none; rank 0 alone writes


def _sync(directory: Path) -> None:
    """Make the names in `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
