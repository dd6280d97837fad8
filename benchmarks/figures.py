"""From times to figures: medians, their spread, and ratios to the best peer."""

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks import systems
from benchmarks.measure import Sample

Row = dict[str, Any]  # of values that JSON has


def rows(samples: Sequence[Sample]) -> list[Row]:
    """Return a row for each sample, in their order; a gap has the same keys, and None for what is unknown.

    A ratio is the median of the best float32 peer on the same workload over the system's own: 2 is twice as
    fast as the best peer. For the best peer it is 1.
    """
    found = [_row(sample) for sample in samples]
    for row in found:
        peers = [
            other
            for other in found
            if other["workload"] == row["workload"]
            and other["precision"] == "float32"
            and other["median_ms"] is not None
            and not systems.is_ours(other["system"])
        ]
        best = min(peers, key=lambda peer: peer["median_ms"], default=None)
        row["best_peer"] = best and best["system"]
        row["ratio_to_best_peer"] = best and row["median_ms"] and best["median_ms"] / row["median_ms"]
    return found


def _row(sample: Sample) -> Row:
    ready = sample.ready
    low, median, high = quartiles_ms(sample.times) if sample.times else (None, None, None)
    losses = ready.get("losses", [None])
    return {
        "workload": sample.workload,
        "system": sample.system,
        "precision": ready.get("precision"),
        "variant": ready.get("variant"),
        "median_ms": median,
        "quartile_1_ms": low,
        "quartile_3_ms": high,
        "spread_ms": None if low is None or high is None else high - low,
        "steps": len(sample.times),
        "ratio_to_best_peer": None,
        "best_peer": None,
        "product_error": ready.get("product_error"),
        "parameters": ready.get("parameters"),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "ready_s": ready.get("ready_s"),
        "variants_ms": ready.get("variants"),
        "versions": ready.get("versions"),
        "gap": sample.gap or None,
        "is_failure": sample.is_failure,
    }


def quartiles_ms(times: Sequence[float]) -> tuple[float, float, float]:
    """Return first quartile, median and third quartile, in milliseconds, of times in seconds."""
    if len(times) == 1:
        return 1e3 * times[0], 1e3 * times[0], 1e3 * times[0]
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return 1e3 * low, 1e3 * median, 1e3 * high
