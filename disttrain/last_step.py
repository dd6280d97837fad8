"""The last step: the state of training in memory that outlives the workers, because their supervisor holds it.

Two files without names (`memfd_create`) take states in turn: a write that is cut short leaves the state before it. Each
begins with a head, which is struck out before a write and written when the rest is there. A worker opens the files
through the supervisor's descriptors; the system lets only processes of the same user do so.
"""

import contextlib
import importlib
import os
import secrets
import struct
import zlib
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeAlias

Bytes: TypeAlias = bytes | memoryview

_HEAD = struct.Struct("<QQQ")  # number of the write, counted from 1; step; bytes that follow
_CHECK = struct.Struct("<L")  # CRC-32 of the head, and of what follows
_BEGIN = _HEAD.size + _CHECK.size


class Store(Protocol):
    """Where the last step is left: `LastStep`, or what reaches one on another host."""

    def write(self, step: int, chunks: Iterable[Bytes]) -> None:
        """Keep a state; as `LastStep.write`."""

    def read(self) -> tuple[int, bytes] | None:
        """Return the newest state; as `LastStep.read`."""

    def close(self) -> None:
        """Let go of it."""


def opened(address: str) -> Store:
    """Return what is at an address: ``MODULE//PLACE`` is opened by a function of the same name in that module.

    Raises:
        OSError: it is out of reach.
    """
    module, is_elsewhere, place = address.partition("//")
    if not is_elsewhere:
        return LastStep.at(address)
    found: Store = importlib.import_module(module).opened(place)
    return found


class LastStep:
    """Two files in which the newest whole state is kept.

    Args:
        files: descriptors of them.
        name: of both, as the system tells it.
    """

    def __init__(self, files: Sequence[int], name: str) -> None:
        self._files = files
        self._name = name
        self._number: int | None = None  # of the newest write; known after the first look

    @classmethod
    def make(cls) -> "LastStep | None":
        """Return empty files, of mode 0600, that this process holds; None where the system has no such memory."""
        if not hasattr(os, "memfd_create"):
            return None
        name = f"disttrain-{secrets.token_hex(16)}"
        files = [os.memfd_create(name) for _ in range(2)]
        for file in files:
            os.fchmod(file, 0o600)
        return cls(files, name)

    @property
    def address(self) -> str:
        """By which other processes of this host open the same files."""
        return ":".join(map(str, (os.getpid(), *self._files, self._name)))

    @classmethod
    def at(cls, address: str) -> "LastStep":
        """Return the files at an address that `address` gave in another process.

        Raises:
            OSError: they are out of reach, as on another host.
        """
        pid, *numbers, name = address.split(":")
        files: list[int] = []
        try:
            for number in numbers:
                path = f"/proc/{pid}/fd/{number}"
                if not os.readlink(path).startswith(f"/memfd:{name}"):  # a pid may be that of another host's process
                    raise FileNotFoundError(f"{path} is another file")
                files.append(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except OSError:
            for file in files:
                os.close(file)
            raise
        return cls(files, name)

    def close(self) -> None:
        """Let go of the files; they are gone when nobody holds them."""
        for file in self._files:
            os.close(file)

    def write(self, step: int, chunks: Iterable[Bytes]) -> None:
        """Keep a state; when this returns it is there, and until then the one before.

        Args:
            step: how many steps were taken.
            chunks: its bytes.

        Raises:
            OSError: there is not enough memory.
        """
        if self._number is None:
            self.read()
        number = (self._number or 0) + 1
        file, end, check = self._files[number % 2], _BEGIN, 0
        _put(file, bytes(_BEGIN), 0)
        for chunk in chunks:
            check = zlib.crc32(chunk, check)
            end = _put(file, chunk, end)
        head = _HEAD.pack(number, step, end - _BEGIN)
        _put(file, head + _CHECK.pack(zlib.crc32(head, check)), 0)
        self._number = number

    def read(self) -> tuple[int, bytes] | None:
        """Return how many steps were taken, and the newest state that is whole; None where there is none."""
        found = []
        for file in self._files:
            with contextlib.suppress(struct.error):
                head = os.pread(file, _BEGIN, 0)
                number, step, size = _HEAD.unpack(head[: _HEAD.size])
                if number and size <= os.fstat(file).st_size - _BEGIN:
                    found.append((number, step, size, _CHECK.unpack(head[_HEAD.size :])[0], file, head[: _HEAD.size]))
        self._number = max((number for number, *_ in found), default=0)
        for _, step, size, check, file, head in sorted(found, reverse=True):
            data = b"".join(_parts(file, size))
            if zlib.crc32(head, zlib.crc32(data)) == check:
                return step, data
        return None


def _put(file: int, data: Bytes, at: int) -> int:
    """Write all of `data` at a place, and return that behind it."""
    left = memoryview(data).cast("B")
    while left:
        written = os.pwrite(file, left, at)
        left, at = left[written:], at + written
    return at


def _parts(file: int, size: int) -> Iterable[bytes]:
    at, end = _BEGIN, _BEGIN + size
    while at < end:
        part = os.pread(file, min(end - at, 1 << 30), at)  # one call gives at most 2 GiB
        if not part:
            return
        yield part
        at += len(part)
