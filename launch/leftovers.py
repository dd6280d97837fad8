"""What an MPI leaves in /dev/shm when its ranks are killed: memory of the machine, until somebody removes the file."""

import contextlib
import os
from collections.abc import Collection
from pathlib import Path

_FOLDER = Path("/dev/shm")  # noqa: S108 - where MPIs put it
_NAMES = ("mpich_shm_*", "sm_segment.*", "ucx_shm_posix_*")  # of MPICH, of Open MPI, of UCX below either


def shared() -> frozenset[Path]:
    """Return the files of MPIs that are there now."""
    return frozenset(path for name in _NAMES for path in _FOLDER.glob(name))


def remove(but: Collection[Path]) -> None:
    """Remove the files of this user that an MPI has left, except `but`: no process that can be seen maps them."""
    found = [path for path in shared().difference(but) if _is_ours(path)]
    mapped = _mapped() if found else ""
    for path in found:
        if str(path) not in mapped:
            path.unlink(missing_ok=True)


def _is_ours(path: Path) -> bool:
    try:
        return path.lstat().st_uid == os.geteuid()
    except OSError:  # its job has removed it
        return False


def _mapped() -> str:
    """Return the maps of all processes that may be looked into: those of this user."""
    texts = []
    for file in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            texts.append(file.read_text(errors="replace"))
    return "".join(texts)
