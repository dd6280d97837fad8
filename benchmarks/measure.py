"""Several systems on one workload, interleaved: each measures a slice in turn, round after round."""

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from benchmarks.process import GapError, Worker
from benchmarks.tasks import Task
from benchmarks.workloads import Workload

FIRST_LOSS, LAST_LOSS = 1e-3, 0.1  # how far a system's loss may be from the others', as a share


@dataclass(kw_only=True)
class Sample:
    """What was measured of a system on a workload, or why nothing was.

    Attributes:
        workload: its name.
        system: its name.
        workers: number of processes that trained together.
        ready: the worker's description of what it measures.
        values: in seconds or bytes.
        gap: why there are none.
        is_failure: whether that is an error, and not only an absence.
    """

    workload: str
    system: str
    workers: int = 1
    ready: dict[str, Any] = field(default_factory=dict)
    values: list[float] = field(default_factory=list)
    gap: str = ""
    is_failure: bool = False


def measure(
    task: Task,
    workload: Workload,
    names: Sequence[str],
    *,
    seconds: float,
    limit_s: float,
    say: Callable[[str], None],
    rounds: int | None = None,
    workers: Sequence[int] = (1,),
) -> list[Sample]:
    """Return a sample of each system with each number of workers.

    Args:
        task: what to measure.
        workload: the model.
        names: of the systems.
        seconds: to spend on the values of each; at least one is measured in each round.
        limit_s: within which a system is ready, and within which it answers.
        say: is told what goes on.
        rounds: number of slices of each; the task's own by default.
        workers: numbers of processes that train together.
    """
    rounds = rounds or task.rounds
    samples = [Sample(workload=workload.name, system=name, workers=n) for name in names for n in workers]

    def worker(sample: Sample) -> Worker:
        return Worker(task.name, sample.system, workload.name, limit_s=limit_s, workers=sample.workers)

    measure_all = _in_fresh_workers if task.is_fresh else _in_lasting_workers
    measure_all(samples, worker, rounds, seconds / rounds, say)
    return samples


def drop_other_models(samples: Sequence[Sample]) -> None:
    """Make gaps of the systems whose losses are not those of the others: they train something else."""
    ready = [sample for sample in samples if not sample.gap]
    for which, at, share in (("first", 0, FIRST_LOSS), ("last", -1, LAST_LOSS)):
        losses = [sample.ready["losses"][at] for sample in ready]
        for sample, loss in zip(ready, losses, strict=True):
            usual = statistics.median(losses)
            if not sample.gap and not math.isclose(loss, usual, rel_tol=share):
                reason = f"its {which} loss is {loss:.5g}, the systems' median {usual:.5g}: another model or rule"
                _make_gap(sample, reason, is_failure=True)


def _in_lasting_workers(
    samples: Sequence[Sample],
    worker: Callable[[Sample], Worker],
    rounds: int,
    slice_s: float,
    say: Callable[[str], None],
) -> None:
    """Measure all slices of a sample in one process."""
    with contextlib.ExitStack() as stack:
        workers = []
        for sample in samples:
            say(f"{sample.workload}: {sample.system} gets ready")
            workers.append(stack.enter_context(worker(sample)))
            with _noted_gap(sample):
                sample.ready = workers[-1].ready()
        drop_other_models(samples)
        say(f"{samples[0].workload}: {rounds} rounds")
        for _ in range(rounds):
            for sample, its_worker in zip(samples, workers, strict=True):
                if not sample.gap:
                    with _noted_gap(sample):
                        _add(sample, its_worker.slice(slice_s))


def _in_fresh_workers(
    samples: Sequence[Sample],
    worker: Callable[[Sample], Worker],
    rounds: int,
    slice_s: float,
    say: Callable[[str], None],
) -> None:
    """Measure each slice of a sample in a process, or a job, of its own."""
    answers: dict[int, list[dict[str, Any]]] = {id(sample): [] for sample in samples}
    for number in range(rounds):
        say(f"{samples[0].workload}: round {number + 1} of {rounds}")
        for sample in samples:
            if not sample.gap:
                with _noted_gap(sample), worker(sample) as its_worker:
                    ready = its_worker.ready()
                    _add(sample, its_worker.slice(slice_s))
                    answers[id(sample)].append(ready | sample.ready)
    for sample in samples:
        sample.ready = _typical(answers[id(sample)])
    for _, alike in groupby(sorted(samples, key=lambda each: each.workers), lambda each: each.workers):
        drop_other_models(list(alike))  # more workers have another batch


def _add(sample: Sample, answer: dict[str, Any]) -> None:
    sample.values += answer.pop("values")
    sample.ready |= answer


def _typical(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the last of a sample's answers, and the median of each of its numbers."""
    return {
        key: statistics.median(answer[key] for answer in answers) if isinstance(value, float) else value
        for key, value in (answers[-1] if answers else {}).items()
    }


@contextlib.contextmanager
def _noted_gap(sample: Sample) -> Iterator[None]:
    try:
        yield
    except GapError as error:
        _make_gap(sample, str(error), is_failure=error.is_failure)


def _make_gap(sample: Sample, reason: str, *, is_failure: bool) -> None:
    sample.gap, sample.is_failure, sample.values = reason, is_failure, []
