"""Weak scaling: steps of one worker, and of several that have a batch each; a job measures once."""

import statistics

from benchmarks.building import able, build, described, learn, system_of, timed
from benchmarks.systems import AbsentError
from benchmarks.tasks import Assignment, Prepared, Task

LEAST_STEPS = 3


def prepare(assignment: Assignment) -> Prepared:
    """Return the description, and the steps on a global batch of one batch for each worker.

    All ranks call both; the number of steps is rank 0's.
    """
    system = system_of(assignment)
    if not hasattr(system, "agreed"):
        raise AbsentError("there is no data-parallel form of this system here")
    workload = assignment.workload.enlarged(assignment.workers)
    variant = system.variants(workload, "scaling")[-1]
    built = build(system, workload, variant)
    losses = learn(built, workload)
    step = able(built, "step")
    once = min(timed(step, 0, at_least=LEAST_STEPS))

    def steps(seconds: float) -> dict[str, list[float]]:
        count = system.agreed(max(LEAST_STEPS, round(seconds / once)))
        # one value a job: how jobs differ is more than how a job's steps do
        return {"values": [statistics.median(timed(step, 0, at_least=count))]}

    return described(system, workload, variant, losses), steps


TASK = Task(
    name="scaling",
    title="Training with the same batch for each worker, a core each",
    prepare=prepare,
    systems=("disttrain",),
    rounds=5,
    is_fresh=True,
    columns={"workers": "workers", "samples_per_s": "samples/s"},
    ratio="ratio_to_one_worker",
)
