"""One system on one workload, in a process of its own: ``python -m benchmarks.worker MODULE WORKLOAD CORE PARENT``.

It answers on what was its standard output, a line of JSON each: first, when its model is ready, with a
description of it; then, for each line of input that is a number of seconds, with the times of the steps taken
in them. It ends when its input does. All that a framework prints goes to the standard error.
"""

import ctypes
import gc
import importlib
import json
import math
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

_PR_SET_PDEATHSIG = 1
TRIAL_S, TRIAL_STEPS = 0.5, 3  # at least, to find the best variant


def main(module_name: str, workload_name: str, core: int, parent: int) -> None:
    """Serve until the input ends, and no longer than the parent lives."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        return
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})  # before anything counts the cores
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    ready, step = _prepare(module_name, workload_name)
    answers.write(json.dumps(ready) + "\n")
    if step is None:
        return
    for line in sys.stdin:
        answers.write(json.dumps(timed(step, float(line))) + "\n")


def timed(step: Callable[[], Any], seconds: float, *, at_least: int = 1) -> list[float]:
    """Return the times, in seconds, of steps that are taken until `seconds` have passed."""
    times: list[float] = []
    start = now = time.perf_counter()
    while now - start < seconds or len(times) < at_least:
        step()
        before, now = now, time.perf_counter()
        times.append(now - before)
    return times


def _prepare(module_name: str, workload_name: str) -> tuple[dict[str, Any], Callable[[], Any] | None]:
    """Return what the parent is told first, and the step, None where something is not there."""
    from benchmarks import workloads
    from benchmarks.systems import AbsentError

    workload = workloads.get(workload_name)
    sys.path.append(os.getcwd())  # a module of the user's own
    start = time.perf_counter()
    try:
        system = importlib.import_module(module_name)
        best, trials = _best(system, workload)
    except ModuleNotFoundError as error:
        if not error.name or f"{module_name}.".startswith(f"{error.name}."):
            raise  # the system itself, not what it needs
        return {"absent": f"{error.name} is not installed"}, None
    except AbsentError as error:
        return {"absent": str(error)}, None
    ready = {
        **best,
        "variants": trials,
        "precision": system.PRECISION,
        "product_error": _product_error(system.product),
        "versions": {name: metadata.version(name) for name in system.PACKAGES},
        "ready_s": time.perf_counter() - start,
    }
    return ready, ready.pop("step")


def _best(system: Any, workload: Any) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the fastest variant, and the median time of each in the trial, in milliseconds."""
    best: dict[str, Any] = {}
    trials: dict[str, float] = {}
    names: Sequence[str] = system.variants(workload)
    for name in names:
        built = system.build(workload, name)
        losses = _learn(built, workload)
        if len(names) > 1:
            trials[name] = 1e3 * statistics.median(timed(built.step, TRIAL_S, at_least=TRIAL_STEPS))
        if not best or trials[name] < trials[best["variant"]]:
            best = {"variant": name, "step": built.step, "parameters": built.parameters, "losses": losses}
        del built
        gc.collect()  # of the loser, before the next is built
    return best, trials


def _learn(built: Any, workload: Any) -> list[float]:
    """Return the losses of the first steps, which also compile whatever is compiled.

    Raises:
        RuntimeError: the model is not the workload's, or it does not learn.
    """
    if built.parameters != workload.parameters():
        raise RuntimeError(f"the model has {built.parameters} parameters, the workload {workload.parameters()}")
    losses = [float(built.step()) for _ in range(workload.learning_steps)]
    if not all(map(math.isfinite, losses)) or not losses[-1] < losses[0]:
        raise RuntimeError(f"the loss does not fall: {losses[0]:.4f}, after {len(losses)} steps {losses[-1]:.4f}")
    return losses


def _product_error(product: Callable[[Any, Any], Any]) -> float:
    """Return the largest error of a product of float32 matrices, as a share of its root mean square."""
    import numpy as np

    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((256, 1024), np.float32), generator.standard_normal((1024, 256), np.float32)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    error = np.abs(np.asarray(product(a, b), np.float64) - exact).max()
    return float(error / np.sqrt(np.mean(exact**2)))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
