"""From what was measured to figures: medians, their spread, and ratios."""

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks import systems
from benchmarks.measure import Sample
from benchmarks.tasks import Task

Row = dict[str, Any]  # of values that JSON has


def rows(task: Task, samples: Sequence[Sample]) -> list[Row]:
    """Return a row for each sample, in their order; a gap has the same keys, and None for what is unknown.

    ``ratio_to_best_peer`` is the median of the best float32 peer on the same workload, with as many workers, over
    the system's own: 2 is twice as fast, or half of the memory. For the best peer it is 1.
    ``ratio_to_one_worker`` is the samples per second of several workers over those of one.
    """
    found = [_row(task, sample) for sample in samples]
    for row in found:
        alike = [other for other in found if other["workload"] == row["workload"] and other["median"] is not None]
        peers = [
            other
            for other in alike
            if other["workers"] == row["workers"]
            and other["precision"] == "float32"
            and not systems.is_ours(other["system"])
        ]
        best = min(peers, key=lambda peer: peer["median"], default=None)
        row["best_peer"] = best and best["system"]
        row["ratio_to_best_peer"] = best and row["median"] and best["median"] / row["median"]
        alone = next((other for other in alike if other["system"] == row["system"] and other["workers"] == 1), None)
        if alone and row["workers"] > 1 and row["median"]:
            row["ratio_to_one_worker"] = row["samples_per_s"] / alone["samples_per_s"]
    return found


def _row(task: Task, sample: Sample) -> Row:
    ready = sample.ready
    low, median, high = quartiles(sample.values) if sample.values else (None, None, None)
    losses = ready.get("losses", [None])
    row = {
        "workload": sample.workload,
        "system": sample.system,
        "workers": sample.workers,
        "precision": ready.get("precision"),
        "variant": ready.get("variant"),
        "unit": task.unit,
        "median": median and task.scale * median,
        "quartile_1": low and task.scale * low,
        "quartile_3": high and task.scale * high,
        "spread": None if low is None or high is None else task.scale * (high - low),
        "values": len(sample.values),
        "ratio_to_best_peer": None,
        "best_peer": None,
        "ratio_to_one_worker": None,
        "samples_per_s": None,
        "product_error": ready.get("product_error"),
        "parameters": ready.get("parameters"),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "variants_ms": ready.get("variants_ms"),
        "versions": ready.get("versions"),
        "gap": sample.gap or None,
        "is_failure": sample.is_failure,
    }
    if median and "samples_per_s" in task.columns:
        row["samples_per_s"] = ready["samples"] / median
    return {key: ready.get(key) for key in task.columns} | row


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return first quartile, median and third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high
