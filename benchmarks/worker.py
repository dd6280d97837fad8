"""A task of one system on one workload, in a process of its own, or in one of a job's.

``python -m benchmarks.worker TASK MODULE WORKLOAD WORKERS STARTED_S PARENT``

It answers on what was its standard output, a line of JSON each: first, when it is ready, with a description
of what it measures; then, for each line of input that is a number of seconds, with the values measured in
them. It ends when its input does. All that a framework prints goes to the standard error. In a job only rank 0
is asked and answers; the others do what it does, once.
"""

import ctypes
import json
import os
import signal
import sys
from collections.abc import Iterable

from disttrain import env

_PR_SET_PDEATHSIG = 1


def main(task: str, module: str, workload: str, workers: str, started_s: str, parent: str) -> None:
    """Serve until the input ends, and no longer than the parent lives."""
    rank = env.place().rank
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if int(workers) == 1 and os.getppid() != int(parent):  # it has ended already
        return
    if hasattr(os, "sched_setaffinity"):
        # before anything counts the cores; from the last one, since the first is the busiest
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[-1 - rank]})
    answers = os.fdopen(os.dup(1) if rank == 0 else os.open(os.devnull, os.O_WRONLY), "w", buffering=1)
    os.dup2(2, 1)

    from benchmarks import tasks, workloads
    from benchmarks.systems import AbsentError

    assignment = tasks.Assignment(
        module=module, workload=workloads.get(workload), workers=int(workers), started_s=float(started_s)
    )
    try:
        ready, measure = tasks.get(task).prepare(assignment)
    except AbsentError as error:
        answers.write(json.dumps({"absent": str(error)}) + "\n")
        return
    answers.write(json.dumps(ready) + "\n")
    requests: Iterable[str] = sys.stdin if rank == 0 else ["0"]
    for seconds in requests:
        answers.write(json.dumps(measure(float(seconds))) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
