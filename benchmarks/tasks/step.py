"""Training steps: forward, backward, optimizer."""

from benchmarks.building import able, best, described, learn, system_of, timed
from benchmarks.tasks import Assignment, Prepared, Task


def prepare(assignment: Assignment) -> Prepared:
    """Return the best variant's description and its steps."""
    system, workload = system_of(assignment), assignment.workload
    choice = best(system, workload, "step", lambda built: (able(built, "step"), learn(built, workload)))
    ready = described(system, workload, choice.variant, choice.losses, choice.trials_ms)
    return ready, lambda seconds: {"values": timed(choice.run, seconds)}


TASK = Task(
    name="step",
    title="A training step on one core: forward, backward, optimizer",
    prepare=prepare,
    systems=("disttrain", "jax", "tensorflow", "torch", "torch_compile"),
)
