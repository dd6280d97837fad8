"""In a worker: a system's model of a workload, its best variant, and the proof that it is that model."""

import gc
import importlib
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np

from benchmarks.architecture import Array
from benchmarks.systems import AbsentError, Built
from benchmarks.tasks import Assignment
from benchmarks.workloads import Workload

TRIAL_S, TRIAL_RUNS = 0.5, 3  # at least, to find the best variant


def system_of(assignment: Assignment) -> Any:
    """Return the system's module, and what it loads is loaded.

    Raises:
        AbsentError: something that it needs is not on this machine.
    """
    system = imported(assignment)
    load(system)
    return system


def imported(assignment: Assignment) -> Any:
    """Return the system's module; what it loads is not loaded yet.

    Raises:
        AbsentError: a framework that it needs is not installed.
    """
    sys.path.append(os.getcwd())  # a module of the user's own
    try:
        return importlib.import_module(assignment.module)
    except ModuleNotFoundError as error:
        if not error.name or f"{assignment.module}.".startswith(f"{error.name}."):
            raise  # the system itself, not what it needs
        raise AbsentError(f"{error.name} is not installed") from error


def load(system: Any) -> None:
    """Load what the system needs beside its modules, as kernels are."""
    getattr(system, "load", lambda: None)()


def able(built: Built, what: str) -> Callable[..., Any]:
    """Return the model's "step", "predict" or "epoch".

    Raises:
        AbsentError: it has none.
    """
    found: Callable[..., Any] | None = getattr(built, what)
    if found is None:
        raise AbsentError(f"there is no {what} of this system here")
    return found


@dataclass(kw_only=True)
class Choice:
    """The variant that is measured.

    Attributes:
        variant: its name.
        run: what is timed.
        losses: the first ones.
        trials_ms: the median time of each variant in its trial; empty where there is only one.
    """

    variant: str
    run: Callable[[], Any]
    losses: list[float]
    trials_ms: dict[str, float]


def best(
    system: Any, workload: Workload, task: str, begin: Callable[[Built], tuple[Callable[[], Any], list[float]]]
) -> Choice:
    """Return the fastest of the system's variants for a task; `begin` returns what to time, and the losses."""
    chosen: Choice | None = None
    trials: dict[str, float] = {}
    names: Sequence[str] = system.variants(workload, task)
    for name in names:
        built = build(system, workload, name)
        run, losses = begin(built)
        if len(names) > 1:
            trials[name] = 1e3 * statistics.median(timed(run, TRIAL_S, at_least=TRIAL_RUNS))
        if chosen is None or trials[name] < trials[chosen.variant]:
            chosen = Choice(variant=name, run=run, losses=losses, trials_ms=trials)
        del built, run
        gc.collect()  # of the loser, before the next is built
    assert chosen is not None
    return chosen


def build(system: Any, workload: Workload, variant: str) -> Built:
    """Return the system's model.

    Raises:
        RuntimeError: it is not the workload's.
    """
    built: Built = system.build(workload, variant)
    if built.parameters != workload.parameters():
        raise RuntimeError(f"the model has {built.parameters} parameters, the workload {workload.parameters()}")
    return built


def learn(built: Built, workload: Workload) -> list[float]:
    """Return the losses of the first steps, which also compile whatever is compiled.

    Raises:
        RuntimeError: the model does not learn.
    """
    step = able(built, "step")
    losses = [float(step()) for _ in range(workload.learning_steps)]
    if not all(map(math.isfinite, losses)) or not losses[-1] < losses[0]:
        raise RuntimeError(f"the loss does not fall: {losses[0]:.4f}, after {len(losses)} steps {losses[-1]:.4f}")
    return losses


def timed(run: Callable[[], Any], seconds: float, *, at_least: int = 1) -> list[float]:
    """Return the times, in seconds, of runs that are made until `seconds` have passed."""
    times: list[float] = []
    start = now = time.perf_counter()
    while now - start < seconds or len(times) < at_least:
        run()
        before, now = now, time.perf_counter()
        times.append(now - before)
    return times


def described(
    system: Any, workload: Workload, variant: str, losses: Sequence[float], trials_ms: dict[str, float] | None = None
) -> dict[str, Any]:
    """Return what a row says of a system, beside its figures."""
    return {
        "variant": variant,
        "variants_ms": trials_ms or {},
        "losses": losses,
        "parameters": workload.parameters(),
        "samples": workload.input_shape[0],
        "precision": system.PRECISION,
        "product_error": product_error(system.product),
        "versions": {name: metadata.version(name) for name in system.PACKAGES},
    }


def product_error(product: Callable[[Any, Any], Any]) -> float:
    """Return the largest error of a product of float32 matrices, as a share of its root mean square."""
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((256, 784), np.float32), generator.standard_normal((784, 256), np.float32)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    error = np.abs(np.asarray(product(a, b), np.float64) - exact).max()
    return float(error / np.sqrt(np.mean(exact**2)))


def cross_entropy(logits: Array, labels: Array) -> float:
    """Return the mean loss of `logits`, shape ``(..., classes)``, for `labels`, shape ``(...)``."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    chosen = np.take_along_axis(shifted, labels[..., None], axis=-1)[..., 0]
    return float(np.mean(np.log(np.exp(shifted).sum(axis=-1)) - chosen))
