"""Several systems on one workload, interleaved: each takes a slice of steps in turn, round after round."""

import contextlib
import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks import systems
from benchmarks.process import GapError, Worker
from benchmarks.workloads import Workload

ROUNDS = 10
FIRST_LOSS, LAST_LOSS = 1e-3, 0.1  # how far a system's loss may be from the others', as a share


@dataclass(kw_only=True)
class Sample:
    """What was measured of a system on a workload, or why nothing was.

    Attributes:
        workload: its name.
        system: its name.
        ready: the worker's description of the model.
        times: of all steps, in seconds.
        gap: why there are none.
        is_failure: whether that is an error, and not only an absence.
    """

    workload: str
    system: str
    ready: dict[str, Any] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)
    gap: str = ""
    is_failure: bool = False


def measure(
    workload: Workload, names: Sequence[str], *, seconds: float, limit_s: float, say: Callable[[str], None]
) -> list[Sample]:
    """Return a sample of each system.

    Args:
        workload: what to train.
        names: of the systems.
        seconds: to spend on the steps of each; at least `ROUNDS` steps are taken.
        limit_s: within which a system is ready, and within which it answers.
        say: is told what goes on.
    """
    samples = [Sample(workload=workload.name, system=name) for name in names]
    workers: dict[str, Worker] = {}
    with contextlib.ExitStack() as stack:
        for sample in samples:
            say(f"{workload.name}: {sample.system} gets ready")
            worker = Worker(systems.module_name(sample.system), workload.name, core=_core(), limit_s=limit_s)
            workers[sample.system] = stack.enter_context(worker)
            with _noted_gap(sample):
                sample.ready = worker.ready()
        drop_other_models(samples)
        say(f"{workload.name}: {ROUNDS} rounds")
        for _ in range(ROUNDS):
            for sample in samples:
                if not sample.gap:
                    with _noted_gap(sample):
                        sample.times += workers[sample.system].steps(seconds / ROUNDS)
    return samples


def drop_other_models(samples: Sequence[Sample]) -> None:
    """Make gaps of the systems whose losses are not those of the others: they train something else."""
    ready = [sample for sample in samples if not sample.gap]
    for which, at, share in (("first", 0, FIRST_LOSS), ("last", -1, LAST_LOSS)):
        losses = [sample.ready["losses"][at] for sample in ready]
        for sample, loss in zip(ready, losses, strict=True):
            usual = statistics.median(losses)
            if not sample.gap and not math.isclose(loss, usual, rel_tol=share):
                sample.gap = f"its {which} loss is {loss:.5g}, the systems' median {usual:.5g}: another model or rule"
                sample.is_failure = True


@contextlib.contextmanager
def _noted_gap(sample: Sample) -> Any:
    try:
        yield
    except GapError as error:
        sample.gap, sample.is_failure, sample.times = str(error), error.is_failure, []


def _core() -> int:
    """Return the core that all workers share: the last one that is allowed, since the first is the busiest."""
    if hasattr(os, "sched_getaffinity"):
        return max(os.sched_getaffinity(0))
    return 0
