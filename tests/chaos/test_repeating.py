"""A job that fails again and again at the same step stops with a diagnosis; one that gets further goes on."""

import contextlib
import os
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(120)

LIMIT_S = 30.0
MIB = 1 << 20
TRANSPORTS = {
    "MPI": ["--launcher", "mpirun"],
    "shm": ["--launcher", "local", "--transport", "shm"],
    "tcp": ["--launcher", "local", "--transport", "tcp"],
}
# `fail` is called on rank 1 in each step, with its number and that of the attempt, counted from 0.
TRAINING = """
import ctypes, os
import numpy as np
import disttrain as dt

ranks = dt.init()
attempt = len(os.listdir("attempts"))
ranks.barrier()
if ranks.rank == 0:
    open(f"attempts/{attempt}", "w").close()

class Failing(dt.layers.Layer):
    def call(self, x):
        if ranks.rank == 1:
            fail(model.optimizer.steps, attempt)
        return x

x = np.random.default_rng(0).random((160, 4))
model = dt.Sequential([Failing(), dt.layers.Dense(4)])
model.build((None, 4))
model.compile("sgd", "mse", static=False)
model.fit(x, x, batch_size=8, epochs=2, verbose=0)
print("trained")
"""
FAILURES = {
    "an exception": ("raise ValueError('sample 140 is damaged')", "ValueError: sample 140 is damaged"),
    "a fault of native code": ("ctypes.string_at(0)", "was ended by SIGSEGV"),
    "an exit": ("os._exit(3)", "ended with exit code 3"),
    "no memory": (f"print(len(bytearray({2048 * MIB})))", "was ended by SIGKILL, for lack of memory"),
}


@pytest.fixture
def confined():
    """Return what starts a program in a cgroup of 512 MiB; skips where none can be made."""
    own = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    above = next((path for _, controllers, path in own if "memory" in controllers.split(",")), None)
    if above is None:
        pytest.skip("there are no cgroups of version 1 that limit memory")
    group = Path("/sys/fs/cgroup/memory" + above.rstrip("/"), f"test.{os.getpid()}")
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"this user may not make a cgroup: {error}")
    try:
        (group / "memory.limit_in_bytes").write_text(str(512 * MIB))
        with contextlib.suppress(OSError):  # where swap is counted: it would be used first
            (group / "memory.memsw.limit_in_bytes").write_text(str(512 * MIB))
        yield {"preexec_fn": lambda: (group / "cgroup.procs").write_text(str(os.getpid()))}
    finally:
        end_s = time.monotonic() + LIMIT_S
        while time.monotonic() < end_s:
            with contextlib.suppress(OSError):  # the last of its processes may be ending
                group.rmdir()
                break
            time.sleep(0.05)


def run(program, condition, fail, transport, **options):
    (program.folder / "attempts").mkdir()
    program.script(f"def fail(step, attempt):\n    if {condition}:\n        {fail}\n{TRAINING}")
    program.env["OPENBLAS_NUM_THREADS"] = "1"
    command = ["run", "-n", "2", *TRANSPORTS[transport], "--max-restarts", "9", "script.py"]
    return program.finish(program.start(*command, **options))


def cells():
    """Return each failure by each transport, once and, in the long form, twenty times in all."""
    made = []
    for failure in FAILURES:
        for number in range(20):
            transport = list(TRANSPORTS)[number % len(TRANSPORTS)]
            is_short = number < (len(TRANSPORTS) if failure == "an exception" else 1)
            marks = () if is_short else pytest.mark.long
            name = f"{failure}-{transport}-{number}".replace(" ", "_")
            made.append(pytest.param(failure, transport, id=name, marks=marks))
    return made


@pytest.mark.parametrize(("failure", "transport"), cells())
def test_three_failures_at_a_step_end_the_job_with_a_diagnosis(request, program, failure, transport):
    if transport == "MPI":
        request.getfixturevalue("mpi")
    options = request.getfixturevalue("confined") if failure == "no memory" else {}
    fail, said = FAILURES[failure]
    began_s = time.monotonic()
    done = run(program, "step == 17", fail, transport, **options)
    assert done.time_s - began_s < LIMIT_S
    assert done.exit_code not in (0, 75)
    assert f"disttrain: no restart: rank 1 of 2 failed 3 times at step 17: {said}; " in done.err
    assert len(list((program.folder / "attempts").iterdir())) == 3


def test_a_job_that_gets_further_each_time_goes_on(program):
    done = run(program, "step == 5 * attempt + 4 < 40", "raise ValueError('again')", "shm")
    assert done.exit_code == 0, done.err
    assert done.err.count("ValueError: again, in step") == 8
    assert done.out.count("trained") == 2
