"""All-reduce in shared memory, whose ranks are threads here: for each instruction set, and under sanitizers."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from disttrain.kernels import build as builder
from disttrain.kernels.instruction_sets import cpu_flags, runnable
from tests.comm import claims
from tests.comm.test_node import SIZES, on_node
from tests.kernels.test_sanitizers import SANITIZERS, compiled

pytestmark = pytest.mark.timeout(100)

DRIVER = Path(__file__).with_name("all_reduce_driver.cpp")
SOURCE = builder.SOURCES / "all_reduce.cpp"


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_values_are_exact_and_nothing_beside_them_is_written(world_size, dtype):
    def work(comm):
        right = []
        for size in SIZES:
            whole = comm.allocate(size + 7, dtype)
            for op in claims.OPS:
                whole[:] = np.nan
                array = whole[3 : 3 + size]  # at no line's beginning, and close to what is not its own
                array[:] = claims.values((size,), dtype, comm.rank)
                comm.all_reduce(array, op)
                right.append(np.array_equal(array, claims.expected(comm, (size,), dtype, op)))
                right.append(np.isnan(whole[:3]).all() and np.isnan(whole[3 + size :]).all())
                comm.barrier()
        return all(right)

    assert on_node(world_size, work) == [True] * world_size


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize("sanitizers", [["-fsanitize=thread", "-Wno-tsan"], SANITIZERS], ids=["thread", "address"])
def test_ranks_race_for_nothing_and_touch_nothing_that_is_not_theirs(tmp_path, sanitizers, ranks):
    portable = runnable(cpu_flags())[-1]
    driver = compiled(tmp_path, portable, DRIVER, SOURCE, sanitizers=[*sanitizers, "-pthread"])
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    command = [driver, str(ranks), "100"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=80, check=False, env=environment)
    assert (done.returncode, done.stdout) == (0, "0 failed\n"), done.stderr[-3000:]
