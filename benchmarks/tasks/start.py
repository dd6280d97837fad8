"""From the start of a process to the end of its first training step; a process measures once."""

import time
from itertools import pairwise

from benchmarks.building import build, described, imported, load
from benchmarks.tasks import Assignment, Prepared, Task


def prepare(assignment: Assignment) -> Prepared:
    """Return the description with the time of each part, in milliseconds, and the whole time."""
    times = [assignment.started_s, time.monotonic()]
    system = imported(assignment)
    times.append(time.monotonic())
    load(system)
    times.append(time.monotonic())
    workload = assignment.workload
    variant = system.variants(workload, "start")[-1]
    built = build(system, workload, variant)
    times.append(time.monotonic())
    assert built.step is not None
    losses = [float(built.step())]
    times.append(time.monotonic())
    ready = described(system, workload, variant, losses)
    for key, (begin, end) in zip(TASK.columns, pairwise(times), strict=True):
        ready[key] = 1e3 * (end - begin)
    return ready, lambda _: {"values": [times[-1] - times[0]]}


TASK = Task(
    name="start",
    title="From the start of a process to the end of its first training step, on one core",
    prepare=prepare,
    rounds=5,
    is_fresh=True,
    columns={
        "python_ms": "Python",  # and NumPy, for all alike
        "import_ms": "import",
        "kernels_ms": "kernels",
        "model_ms": "model",
        "step_ms": "step",
    },
)
