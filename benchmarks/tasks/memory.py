"""Peak resident memory of training; a process measures once."""

import resource
import sys
from pathlib import Path

from benchmarks.building import build, described, learn, system_of
from benchmarks.tasks import Assignment, Prepared, Task

MIB = 2**20


def prepare(assignment: Assignment) -> Prepared:
    """Return the description and the peak: of the process, and above what it had when all was imported."""
    system, workload = system_of(assignment), assignment.workload
    before = resident("VmRSS")
    variant = system.variants(workload, "memory")[-1]
    built = build(system, workload, variant)
    losses = learn(built, workload)
    peak = resident("VmHWM")
    ready = described(system, workload, variant, losses)
    ready |= {"imported_mib": before / MIB, "above_mib": (peak - before) / MIB}
    return ready, lambda _: {"values": [peak]}


def resident(name: str, status: Path = Path("/proc/self/status")) -> int:
    """Return the bytes of this process that are in memory ("VmRSS") or were at most ("VmHWM").

    Where there is no `status`, both are the most that there were.
    """
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    line = next(line for line in status.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


TASK = Task(
    name="memory",
    title="Peak resident memory of training",
    prepare=prepare,
    unit="MiB",
    scale=1 / MIB,
    rounds=3,
    is_fresh=True,
    columns={"imported_mib": "imported", "above_mib": "above that"},
)
