"""Weak scaling: steps of one worker, and of several that have a batch each; a job measures once."""

import statistics

from benchmarks.building import able, build, described, learn, system_of, timed
from benchmarks.systems import AbsentError
from benchmarks.tasks import Assignment, Prepared, Task
from benchmarks.workloads import Workload

LEAST_STEPS = 3
_SHARES = 0.2  # of the time, for steps whose parts are timed


def prepare(assignment: Assignment) -> Prepared:
    """Return the description, and the steps on a global batch of one batch for each worker."""
    return prepared(assignment, assignment.workload.enlarged(assignment.workers))


def prepared(assignment: Assignment, workload: Workload) -> Prepared:
    """Return the description, and the steps on a workload's batch, which the workers divide.

    All ranks call both; the number of steps is rank 0's.
    """
    system = system_of(assignment)
    if not hasattr(system, "agreed"):
        raise AbsentError("there is no data-parallel form of this system here")
    variant = system.variants(workload, "scaling")[-1]
    built = build(system, workload, variant)
    losses = learn(built, workload)
    step = able(built, "step")
    once = min(timed(step, 0, at_least=LEAST_STEPS))

    def steps(seconds: float) -> dict[str, list[float]]:
        count = system.agreed(max(LEAST_STEPS, round(seconds / once)))
        # one value a job: how jobs differ is more than how a job's steps do
        values = [statistics.median(timed(step, 0, at_least=count))]
        if not hasattr(system, "shares"):
            return {"values": values}
        return {"values": values, **system.shares(step, max(LEAST_STEPS, round(_SHARES * count)))}

    return described(system, workload, variant, losses), steps


TASK = Task(
    name="scaling",
    title="Training with the same batch for each worker, a core each",
    prepare=prepare,
    systems=("disttrain", "torch_ddp"),
    rounds=5,
    is_fresh=True,
    columns={
        "workers": "workers",
        "samples_per_s": "samples/s",
        "compute": "compute",
        "communication": "comm.",
        "waiting": "waits",
        "data": "data",
        "ratio_to_best_peer": "to peer",
    },
    ratio="ratio_to_one_worker",
)
