"""Where checkpoints lie: a directory of numbered ones, on a disk or behind any fsspec address.

A checkpoint is there as a whole or not at all. It is written as a draft, and committed: on a disk under a temporary
name, flushed, and renamed; elsewhere by its manifest, which is written last, and without which it does not count.
"""

import contextlib
import json
import os
import re
import socket
import stat
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import fsspec
from filelock import FileLock, Timeout
from fsspec.implementations.local import LocalFileSystem

from disttrain.checkpoint import disk
from disttrain.checkpoint.format import MANIFEST
from disttrain.errors import CheckpointDamagedError, CheckpointError

_NAME = re.compile(r"checkpoint-(\d{6,18})")
_TEMPORARY = ".tmp-"
_SEEN = ".seen-"
_DAMAGED = "damaged-"
_OWNER = ".run.json"
_OWNER_BYTES = 1 << 16
_LOCK_TIMEOUT_S = 60.0
_CLAIM_TIMEOUT_S = 1.0


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
        """Return the entries of the place that count; an empty list if it does not exist."""

    @abstractmethod
    def has_file(self, name: str) -> bool:
        """Return whether the place holds a file `name`."""

    @abstractmethod
    def read(self, name: str, limit: int) -> bytes:
        """Return the content of a file, or raise CheckpointDamagedError if it is missing or above `limit` bytes."""

    @abstractmethod
    def make_draft(self, token: str, name: str) -> str:
        """Begin the checkpoint `name`, so that who knows the `token` finds it; return the folder to write it into."""

    @abstractmethod
    def find_draft(self, token: str) -> str | None:
        """Return the folder of the draft with this token, None where there is none yet."""

    @abstractmethod
    def write(self, name: str, chunks: Iterable[disk.Bytes]) -> None:
        """Write a new file, durably."""

    @abstractmethod
    def remove_file(self, name: str) -> None:
        """Remove a file of a draft."""

    @abstractmethod
    def commit(self, token: str, name: str, manifest: bytes) -> None:
        """Make the draft the checkpoint `name`, durably: after this it is there, before it is not."""

    @abstractmethod
    def discard(self, token: str) -> None:
        """Remove what there is of a draft, as far as that is possible."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a checkpoint, so that it is never seen in part."""

    @abstractmethod
    def leftovers(self) -> list[str]:
        """Return what writers that ended in the middle have left."""

    @abstractmethod
    def remove_leftover(self, name: str) -> None:
        """Remove one of these, unless it is gone."""

    @abstractmethod
    def set_aside(self, name: str) -> str:
        """Give a damaged checkpoint a name under which it does not count, and return that."""

    @abstractmethod
    def lock(self) -> contextlib.AbstractContextManager[Any]:
        """Keep other writers out, and remove what they left; the place is made if need be."""

    @abstractmethod
    def leave_token(self, token: str) -> None:
        """Leave something for other ranks to see, if they look at the same place; it is made if need be.

        Raises:
            CheckpointError: that is not possible.
        """

    def sees_token(self, token: str) -> bool:
        """Return whether this is the place where the token was left."""
        return self.has_file(_SEEN + token)

    def remove_token(self, token: str) -> None:
        """Remove the token."""
        with contextlib.suppress(OSError):
            self.remove_file(_SEEN + token)

    @abstractmethod
    def claim(self) -> "Claim":
        """Make the place that of one run, until the claim is released.

        Raises:
            CheckpointError: another run has it, which is alive; names it.
        """

    def numbers(self) -> dict[int, str]:
        """Return the numbers of the checkpoints with their names, ascending."""
        found = {int(m[1]): name for name in self.names() if (m := _NAME.fullmatch(name))}
        return dict(sorted(found.items()))

    def owner(self) -> dict[str, Any]:
        """Return what the run that claimed this place last said of itself; empty where none did."""
        try:
            found = json.loads(self.read(_OWNER, _OWNER_BYTES))
        except (CheckpointDamagedError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def free_bytes(self) -> int | None:
        """Return how much more this place can hold, None where that is not known."""
        return None


class Claim:
    """A run's right to write to a place, which ends when another run takes it over.

    Args:
        place: where.
        held: what is released with it.
    """

    def __init__(self, place: Storage, held: contextlib.ExitStack) -> None:
        self._place = place
        self._held = held
        before = place.owner().get("generation")
        self.generation = (before if isinstance(before, int) else 0) + 1

    def words(self) -> bytes:
        """Return what is left in the place, so that others know whose it is."""
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        found = {"generation": self.generation, "host": socket.gethostname(), "pid": os.getpid(), "since": since}
        return json.dumps(found).encode()

    def check(self) -> None:
        """Do nothing while the place is this run's.

        Raises:
            CheckpointError: another run has taken it over; names it.
        """
        owner = self._place.owner()
        if owner.get("generation") != self.generation:
            raise CheckpointError(
                f"{self._place.place}: {_in_words(owner)} has taken this directory over; this run writes nothing more "
                "to it. Give each run a directory of its own"
            )

    def release(self) -> None:
        """Leave the place to others."""
        self._held.close()


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
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC  # no link that leads elsewhere, in the directory's place too
        try:
            folder = os.open(path.parent, flags | os.O_DIRECTORY if path.parent != self.root else os.O_RDONLY)
            try:
                descriptor = os.open(path.name, flags | os.O_NONBLOCK, dir_fd=folder)  # a pipe would never end
            finally:
                os.close(folder)
            with open(descriptor, "rb") as file:
                found = os.fstat(descriptor)
                if not stat.S_ISREG(found.st_mode):
                    raise CheckpointDamagedError(f"{path}: cannot be read: it is no file")
                if found.st_size > limit:
                    raise CheckpointDamagedError(f"{path}: {found.st_size} bytes, at most {limit} expected")
                return file.read(found.st_size)  # not `limit`: memory for it is taken at once
        except OSError as error:
            raise CheckpointDamagedError(f"{path}: cannot be read: {error.strerror}") from error

    def make_draft(self, token: str, name: str) -> str:
        folder = _TEMPORARY + token
        disk.mkdir(self.root / folder)
        return folder

    def find_draft(self, token: str) -> str | None:
        folder = _TEMPORARY + token
        return folder if (self.root / folder).is_dir() else None

    def write(self, name: str, chunks: Iterable[disk.Bytes]) -> None:
        disk.write_file(self.root / name, chunks)

    def remove_file(self, name: str) -> None:
        disk.unlink(self.root / name)

    def commit(self, token: str, name: str, manifest: bytes) -> None:
        draft = self.root / (_TEMPORARY + token)
        disk.write_file(draft / MANIFEST, [manifest])
        disk.sync_names(draft)
        disk.rename(draft, self.root / name)
        disk.sync_names(self.root)

    def discard(self, token: str) -> None:
        disk.try_to_remove(self.root / (_TEMPORARY + token))

    def remove(self, name: str) -> None:
        hidden = self.root / f"{_TEMPORARY}removed-{name}"
        disk.rename(self.root / name, hidden)
        disk.sync_names(self.root)  # else a loss of power may bring back what is half removed
        disk.try_to_remove(hidden)

    def leftovers(self) -> list[str]:
        return sorted(name for name in self.names() if name.startswith(_TEMPORARY))

    def remove_leftover(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            disk.remove_tree(self.root / name)

    def set_aside(self, name: str) -> str:
        taken, aside = set(self.names()), f"{_DAMAGED}{name}"
        number = 1
        while aside in taken:
            number += 1
            aside = f"{_DAMAGED}{name}.{number}"
        disk.rename(self.root / name, self.root / aside)
        disk.sync_names(self.root)
        return aside

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        disk.make_directories(self.root)
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(FileLock(self.root / ".lock", timeout=_LOCK_TIMEOUT_S))
            except Timeout as error:
                raise CheckpointError(
                    f"{self.root}: another process has been writing here for {_LOCK_TIMEOUT_S:.0f} s; "
                    "give each run a directory of its own"
                ) from error
            for name in self.leftovers():  # a writer ended in the middle: the lock is ours
                disk.try_to_remove(self.root / name)
            yield

    def leave_token(self, token: str) -> None:
        try:
            disk.make_directories(self.root)
            self.write(_SEEN + token, [])
        except OSError as error:
            raise _unwritable(self.place, error) from error

    def claim(self) -> Claim:
        try:
            disk.make_directories(self.root)
            return self._claim()
        except OSError as error:
            raise _unwritable(self.place, error) from error

    def _claim(self) -> Claim:
        held = contextlib.ExitStack()
        try:
            # the system releases it when the process ends, whatever its end, its number or the clock
            held.enter_context(FileLock(self.root / ".run.lock", timeout=_CLAIM_TIMEOUT_S))
        except Timeout as error:
            held.close()
            raise CheckpointError(
                f"{self.root} belongs to a run that goes on: {_in_words(self.owner())}. Give each run a directory of "
                "its own, or end that one first"
            ) from error
        with self.lock():
            claim = Claim(self, held)
            temporary = self.root / f"{_TEMPORARY}owner"
            disk.write_file(temporary, [claim.words()])
            disk.rename(temporary, self.root / _OWNER)
            disk.sync_names(self.root)
        return claim

    def free_bytes(self) -> int | None:
        found = os.statvfs(next(each for each in (self.root, *self.root.parents) if each.exists()))
        return found.f_bavail * found.f_frsize


class _Remote(Storage):
    """Behind an address. Nothing is renamed there, and nothing locked."""

    def __init__(self, filesystem: Any, root: str) -> None:
        self.filesystem = filesystem
        self.root = root.rstrip("/")
        self.place = str(filesystem.unstrip_protocol(self.root))

    def names(self) -> list[str]:
        return [name for name in self._entries() if self.has_file(f"{name}/{MANIFEST}")]

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

    def make_draft(self, token: str, name: str) -> str:
        self.filesystem.makedirs(f"{self.root}/{name}", exist_ok=True)
        self.filesystem.pipe_file(f"{self.root}/{_TEMPORARY}{token}", name.encode())
        return name

    def find_draft(self, token: str) -> str | None:
        if not self.has_file(_TEMPORARY + token):
            return None
        return bytes(self.filesystem.cat_file(f"{self.root}/{_TEMPORARY}{token}")).decode()

    def write(self, name: str, chunks: Iterable[disk.Bytes]) -> None:
        with self.filesystem.open(f"{self.root}/{name}", "wb") as file:
            for chunk in chunks:
                file.write(chunk)

    def remove_file(self, name: str) -> None:
        self.filesystem.rm_file(f"{self.root}/{name}")

    def commit(self, token: str, name: str, manifest: bytes) -> None:
        self.filesystem.pipe_file(f"{self.root}/{name}/{MANIFEST}", manifest)
        self.remove_file(_TEMPORARY + token)

    def discard(self, token: str) -> None:
        with contextlib.suppress(OSError):
            folder = self.find_draft(token)
            if folder is not None and not self.has_file(f"{folder}/{MANIFEST}"):
                self.filesystem.rm(f"{self.root}/{folder}", recursive=True)
            self.remove_file(_TEMPORARY + token)

    def remove(self, name: str) -> None:
        self.filesystem.rm_file(f"{self.root}/{name}/{MANIFEST}")
        self.filesystem.rm(f"{self.root}/{name}", recursive=True)

    def leftovers(self) -> list[str]:
        known = set(self.names())
        return sorted(name for name in self._entries() if name not in known and self._is_leftover(name))

    def remove_leftover(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.rm(f"{self.root}/{name}", recursive=True)

    def set_aside(self, name: str) -> str:
        aside = f"{name}/{_DAMAGED}{MANIFEST}"
        self.filesystem.mv(f"{self.root}/{name}/{MANIFEST}", f"{self.root}/{aside}")
        return aside

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        yield  # object stores have none; rank 0 alone commits, and a claim tells of others

    def leave_token(self, token: str) -> None:
        try:
            self.filesystem.makedirs(self.root, exist_ok=True)
            self.filesystem.pipe_file(f"{self.root}/{_SEEN}{token}", b"here")
        except OSError as error:
            raise _unwritable(self.place, error) from error

    def claim(self) -> Claim:
        claim = Claim(self, contextlib.ExitStack())
        try:
            self.filesystem.makedirs(self.root, exist_ok=True)
            self.filesystem.pipe_file(f"{self.root}/{_OWNER}", claim.words())
        except OSError as error:
            raise _unwritable(self.place, error) from error
        return claim

    def _is_leftover(self, name: str) -> bool:
        if name.startswith(_TEMPORARY):
            return True
        return _NAME.fullmatch(name) is not None and not self.has_file(f"{name}/{_DAMAGED}{MANIFEST}")

    def _entries(self) -> list[str]:
        if not self.filesystem.isdir(self.root):
            return []
        return [str(path).rstrip("/").rsplit("/", 1)[-1] for path in self.filesystem.ls(self.root, detail=False)]


def _unwritable(place: str, error: OSError) -> CheckpointError:
    return CheckpointError(f"{place}: nothing can be written here: {error.strerror or error}")


def _in_words(owner: dict[str, Any]) -> str:
    if not owner:
        return "one that did not say which"
    return f"process {owner.get('pid')} on host {owner.get('host')}, since {owner.get('since')}"
