"""Whole epochs of Fashion-MNIST: all that happens around steps as well, and what was learned."""

from typing import Any

import numpy as np

import disttrain as dt
from benchmarks.architecture import Array
from benchmarks.building import able, best, build, described, learn, system_of, timed
from benchmarks.tasks import Assignment, Prepared, Task

LEAST_ACCURACY = 0.6  # of the classes' 0.1 by chance, after an epoch


def prepare(assignment: Assignment) -> Prepared:
    """Return the best variant's description and its epochs, after a first one, which is not counted."""
    system, workload = system_of(assignment), assignment.workload
    choice = best(system, workload, "epoch", lambda built: (able(built, "step"), learn(built, workload)))
    (x, y), (x_test, y_test) = fashion_mnist(workload.input_shape[1:])
    built = build(system, workload, choice.variant)  # one that has not learned the trial's batch
    epoch, predict = able(built, "epoch"), able(built, "predict")

    def accuracy() -> float:
        return float(np.mean(predict(x_test).argmax(axis=-1) == y_test))

    epoch(x, y)
    first = accuracy()
    if not first > LEAST_ACCURACY:
        raise RuntimeError(f"it does not learn: test accuracy {first:.3f} after an epoch")

    def epochs(seconds: float) -> dict[str, Any]:
        values = timed(lambda: epoch(x, y), seconds)
        return {"values": values, "test_accuracy": accuracy()}

    ready = described(system, workload, choice.variant, choice.losses, choice.trials_ms)
    return {**ready, "samples": len(x), "test_accuracy": first}, epochs


def fashion_mnist(shape: tuple[int, ...]) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Return images from 0 to 1, float32, each of `shape`, and labels, int64: for training and for testing.

    Raises:
        DatasetMissingError: they are not on this machine; the message names the command.
    """
    train, test = (
        (x.reshape(-1, *shape).astype(np.float32) / np.float32(255), y.astype(np.int64))
        for x, y in dt.datasets.fashion_mnist.load_data()
    )
    return train, test


def _check() -> None:
    dt.datasets.fashion_mnist.load_data()


TASK = Task(
    name="epoch",
    title="An epoch of Fashion-MNIST on one core",
    prepare=prepare,
    unit="s",
    scale=1.0,
    systems=("disttrain", "jax", "keras", "torch"),
    workloads=("W1", "W2", "W3"),
    rounds=3,
    columns={"samples_per_s": "samples/s", "test_accuracy": "accuracy"},
    check=_check,
)
