"""What a checkpoint does to a disk: each operation here, and nowhere else, so that tests can let any of them fail."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

Bytes: TypeAlias = bytes | memoryview


def mkdir(path: Path) -> None:
    """Make a directory that is not there yet."""
    os.mkdir(path)


def create(path: Path) -> int:
    """Return a descriptor of a new file; a link in its place is not followed."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def write(descriptor: int, data: Bytes) -> None:
    """Write all of `data`."""
    left = memoryview(data).cast("B")
    while left:
        left = left[os.write(descriptor, left) :]


def sync(descriptor: int) -> None:
    """Have what was written on the disk, not only in memory; of a directory, the names in it."""
    os.fsync(descriptor)


def rename(old: Path, new: Path) -> None:
    """Give a file or directory another name, in one step."""
    os.rename(old, new)


def unlink(path: Path) -> None:
    """Remove a file, or a link."""
    os.unlink(path)


def rmdir(path: Path) -> None:
    """Remove an empty directory."""
    os.rmdir(path)


def write_file(path: Path, chunks: Iterable[Bytes]) -> None:
    """Write a new file, durably but for its name."""
    descriptor = create(path)
    try:
        for chunk in chunks:
            write(descriptor, chunk)
        sync(descriptor)
    finally:
        os.close(descriptor)


def sync_names(directory: Path) -> None:
    """Make the names in `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(path: Path) -> None:
    """Remove a directory with all that is in it, or a file; links are removed, not followed."""
    if path.is_symlink() or not path.is_dir():
        unlink(path)
        return
    for name in sorted(os.listdir(path)):
        remove_tree(path / name)
    rmdir(path)


def try_to_remove(path: Path) -> None:
    """Remove what can be removed; what is left is tried again before the next checkpoint is written."""
    with contextlib.suppress(OSError):
        remove_tree(path)


def make_directories(path: Path) -> None:
    """Make `path` and its missing parents, durably."""
    missing = [each for each in (path, *path.parents) if not each.is_dir()]
    for each in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another rank or job was faster
            mkdir(each)
        sync_names(each.parent)
