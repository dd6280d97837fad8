"""Prediction: from inputs to logits, batch by batch, all in arrays on the host."""

from collections.abc import Callable
from typing import Any

from benchmarks.building import able, best, cross_entropy, described, system_of, timed
from benchmarks.systems import Built
from benchmarks.tasks import Assignment, Prepared, Task

BATCHES = 4  # in a call


def prepare(assignment: Assignment) -> Prepared:
    """Return the best variant's description and its predictions; the loss is that of the first ones."""
    system, workload = system_of(assignment), assignment.workload
    enlarged = workload.enlarged(BATCHES)
    x, y = enlarged.batch()

    def begin(built: Built) -> tuple[Callable[[], Any], list[float]]:
        predict = able(built, "predict")
        logits = predict(x)
        if logits.shape != (*y.shape, workload.classes):
            raise RuntimeError(f"predictions have shape {logits.shape}, expected {(*y.shape, workload.classes)}")
        return lambda: predict(x), [cross_entropy(logits, y)]

    choice = best(system, workload, "predict", begin)
    ready = described(system, enlarged, choice.variant, choice.losses, choice.trials_ms)
    return ready, lambda seconds: {"values": timed(choice.run, seconds)}


TASK = Task(
    name="predict",
    title=f"Prediction on one core: a call with {BATCHES} batches",
    prepare=prepare,
    systems=("disttrain", "torch", "onnxruntime"),
    rounds=5,
    columns={"samples_per_s": "samples/s"},
)
