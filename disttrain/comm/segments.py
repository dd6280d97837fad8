"""Memory that several processes of a node map: it has no name, and is gone when the last of them is.

A file in /dev/shm would outlive a job that is killed between making it and removing its name, others could see it
there, and containers often give that folder 64 MB. Memory from `memfd_create` is reached through the process that
made it, by those whom the system lets look into that process: others of the same user.
"""

import mmap
import os
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from disttrain.errors import CommError

Exchange = Callable[[Any], list[Any]]


class SegmentsError(CommError):
    """Memory cannot be shared: on all ranks, where it cannot be on one."""


def share(nbytes: int, exchange: Exchange, ranks: Sequence[int]) -> list[mmap.mmap]:
    """Return a segment of memory of each rank, zeroed, which all ranks have mapped; every rank calls this.

    Args:
        nbytes: size of a segment, at least 1; the same on all ranks.
        exchange: returns the JSON values that all ranks have passed to it, in the order of their ranks.
        ranks: what they are called in errors.

    Raises:
        SegmentsError: on all ranks, if one has no such memory, or cannot reach that of another one.
    """
    fd, place = _segment(nbytes)
    try:
        mapped, problem = _mapped(exchange(place), nbytes, ranks)
        problems = exchange(problem)  # and nobody closes a segment before all have mapped it
    finally:
        if fd >= 0:
            os.close(fd)
    for rank, text in zip(ranks, problems, strict=True):
        if text:
            raise SegmentsError(f"rank {rank} cannot share {nbytes} bytes of memory: {text}")
    return mapped


def _segment(nbytes: int) -> tuple[int, list[Any]]:
    """Return a descriptor of new memory, and how others find it; a negative one, and what went wrong."""
    if not hasattr(os, "memfd_create"):
        return -1, ["this system has no memfd_create"]
    token = f"disttrain-{secrets.token_hex(16)}"
    fd = os.memfd_create(token)
    try:
        os.fchmod(fd, 0o600)
        os.posix_fallocate(fd, 0, nbytes)  # else a lack of memory would be a SIGBUS at some later access
    except OSError as error:
        os.close(fd)
        return -1, [str(error)]
    return fd, [os.getpid(), fd, token]


def _mapped(places: list[list[Any]], nbytes: int, ranks: Sequence[int]) -> tuple[list[mmap.mmap], str]:
    """Map the segments at `places`, of `ranks`; return them, and what went wrong."""
    mapped: list[mmap.mmap] = []
    for rank, place in zip(ranks, places, strict=True):
        if len(place) == 1:
            return [], f"that of rank {rank}: {place[0]}"
        pid, number, token = place
        path = f"/proc/{pid}/fd/{number}"
        try:
            # The pid may be of another container's processes, or of another host's.
            if not os.readlink(path).startswith(f"/memfd:{token}"):
                return [], f"{path} is not that of rank {rank}"
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                mapped.append(mmap.mmap(fd, nbytes))
            finally:
                os.close(fd)
        except OSError as error:
            return [], f"that of rank {rank} is out of reach: {error}"
    return mapped, ""
