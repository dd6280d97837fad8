"""A job goes on through faults that come before it has recovered from the last one, to the same bits."""

import random
import re
import shutil
import time
from pathlib import Path

import pytest

from tests.chaos.jobs import Disk, Disturbed, check_reasons

pytestmark = [pytest.mark.usefixtures("mpi"), pytest.mark.timeout(240)]

EPOCHS, STEP_S = "5", "0.1"  # 40 steps
GAP_S = 0.3  # in the mean; to start again takes longer
TRIALS = 100
FAULTS = ("kill_one", "kill_all", "kill_supervisor", "kill_launcher")


@pytest.mark.parametrize("number", [0, *(pytest.param(n, marks=pytest.mark.long) for n in range(1, TRIALS))])
def test_same_bits_through_faults_that_follow_one_another(program, undisturbed, number):
    shutil.copy(Path(__file__).with_name("soaked.py"), program.folder)
    chance = random.Random(number)
    if not undisturbed:
        undisturbed["end"] = program.run("run", "soaked.py", EPOCHS, "0").out
        (program.folder / "steps").unlink()
    how = chance.choice([["mpirun"], ["local", "--transport", "shm"], ["local", "--transport", "tcp"]])
    command = ["run", "-n", str(chance.randint(2, 3)), "--launcher", *how, "--max-restarts", "99"]
    disk = Disk(program.folder / "files")
    job = Disturbed(program, disk, chance, [*command, "soaked.py", EPOCHS, STEP_S, "files/run"], FAULTS)
    end_s = time.monotonic() + 180
    try:
        job.go_on(chance.uniform(0, 3))
        for _ in range(chance.randint(2, 5)):
            if not job.has_finished:
                job.disturb()
            job.go_on(chance.expovariate(1 / GAP_S))
        while not job.has_finished:
            assert time.monotonic() < end_s, job.err[-20_000:]
            job.go_on(1)
    finally:
        job.leave()
        disk.close()
    (end,) = set(re.findall(r"finished .*", job.out))
    assert end in undisturbed["end"]
    check_reasons(job.err)
