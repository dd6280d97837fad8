"""Whether the kernel has ended processes for lack of memory: what a SIGKILL may mean."""

import contextlib
import re
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def kills() -> int:
    """Return how many processes were ended so: in the cgroup of this one, else on the whole host; 0 if unknown."""
    for path, pattern in [
        *((file, r"^oom_kill (\d+)") for file in _files()),
        (Path("/proc/vmstat"), r"^oom_kill (\d+)"),
    ]:
        with contextlib.suppress(OSError):
            if match := re.search(pattern, path.read_text(), re.MULTILINE):
                return int(match[1])
    return 0


def limit_bytes() -> int | None:
    """Return the memory that the cgroup of this process may use, None where there is no limit."""
    limits = []
    for file in _files():
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):  # "max"
                limits.append(int((file.parent / name).read_text()))
    return min((limit for limit in limits if limit < 1 << 60), default=None)


def _files() -> list[Path]:
    """Return the files of this process's cgroup that count, of version 2 and of version 1."""
    files = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                files.append(_CGROUPS / path.lstrip("/") / "memory.events")
            elif "memory" in controllers.split(","):
                files.append(_CGROUPS / "memory" / path.lstrip("/") / "memory.oom_control")
    return files
