"""Strong scaling: steps on one batch that one worker has, or several divide."""

from dataclasses import replace

from benchmarks.tasks import Assignment, Prepared
from benchmarks.tasks.scaling import TASK as WEAK
from benchmarks.tasks.scaling import prepared


def prepare(assignment: Assignment) -> Prepared:
    """Return the description, and the steps on the workload's batch, of which each worker has its part."""
    return prepared(assignment, assignment.workload)


TASK = replace(
    WEAK, name="scaling_strong", title="Training with one batch that the workers divide, a core each", prepare=prepare
)
