"""Ranks that are left go on without a restart where the MPI can lose one: to the same bits, in less than a second."""

import itertools
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from disttrain.errors import LaunchError
from launch.mpirun import find_mpi
from tests.chaos.test_restart import EPOCHS, STEPS, check_ledger, run_alone, workers_of

try:
    if not find_mpi().may_lose_ranks:
        pytest.skip("no MPI here that can lose a rank; make ulfm brings Open MPI", allow_module_level=True)
except LaunchError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.timeout(240)

TRIALS = 60
LATEST = 18  # step, in whose time a kill comes at the latest: the end of a job is no place to shrink


@pytest.fixture
def job(program):
    """Return a program in whose folder the trainings are."""
    program.limit_s = 120.0
    for name in ("restarted.py", "shrunk.py"):
        shutil.copy(Path(__file__).with_name(name), program.folder)
    return program


def steps_of(job):
    """Return the steps that each rank has noted, with their times, by the number that its launcher gave it."""
    found = {}
    for path in job.folder.glob("steps.*"):
        lines = [line.split() for line in path.read_text().splitlines() if not line.startswith("pid")]
        found[int(path.suffix[1:])] = [(int(step), float(time_s)) for step, time_s in lines]
    return found


def newest(job):
    return max((step for notes in steps_of(job).values() for step, _ in notes), default=0)


def await_step(job, process, step):
    end_s = time.monotonic() + 60
    while newest(job) < step and process.poll() is None:
        assert time.monotonic() < end_s
        time.sleep(0.01)


def kill(job, process, chance):
    """Kill a rank; return which, by the number that its launcher gave it, and when."""
    pid = chance.choice(workers_of(process))
    os.kill(pid, signal.SIGKILL)
    at_s = time.monotonic()
    (rank,) = [path.suffix[1:] for path in job.folder.glob("steps.*") if f"pid {pid} " in path.read_text()]
    return int(rank), at_s


def finished(done):
    assert done.exit_code == 0, done.err
    (found,) = re.findall(r"finished (.*)", done.out)
    return found


@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=() if n in (0, 5) else pytest.mark.long) for n in range(TRIALS)]
)
def test_same_bits_whichever_rank_is_killed(job, undisturbed, pauses_s, number):
    if not undisturbed:
        undisturbed["end"] = run_alone(job)
    chance = random.Random(number)
    workers = chance.randint(2, 4)
    kills = chance.randint(1, workers - 1)
    has_files = chance.random() < 0.3  # whose writing ranks may be lost in, which ends in a restart
    files = ["files"] if has_files else []
    bounds = ["--min-workers", "1", "--max-restarts", "9"]
    process = job.start("run", "-n", str(workers), "--launcher", "mpirun", *bounds, "restarted.py", str(EPOCHS), *files)
    kills_at = []
    for _ in range(kills):
        await_step(job, process, newest(job) + chance.randint(1, 3))
        time.sleep(chance.uniform(0, 0.3))
        if newest(job) > LATEST or len(workers_of(process)) < 2:
            break
        kills_at.append(kill(job, process, chance))
    done = job.finish(process)
    assert done.exit_code == 0, done.err
    assert re.findall(r"finished .*", done.out) == [undisturbed["end"]], done.err
    if not has_files:
        assert "disttrain: restart" not in done.err
        for notes in steps_of(job).values():
            for (before, _), (after, _) in itertools.pairwise(notes):
                assert before < after, (notes, done.err)  # no step that had ended was lost
        if "disttrain: more workers" not in done.err:  # as after 10 s
            pauses_s += [pause_s(job, *each) for each in kills_at]
    assert {int(step) for notes in steps_of(job).values() for step, _ in notes} == set(range(1, STEPS + 1))


def pause_s(job, rank, at_s):
    """Return how long it took from a kill until all that were left had ended a step without that rank.

    That is, at the latest, the second after the last one that the rank has noted; each sleeps 0.1 s, which counts.
    """
    notes = steps_of(job)
    first = max((step for step, _ in notes[rank]), default=0) + 2
    ends_s = [[time_s for step, time_s in found if step >= first and time_s > at_s] for found in notes.values()]
    return max(times[0] for times in ends_s if times) - at_s


def test_without_reproducible_it_ends_as_a_run_that_went_on_with_fewer(job):
    done = job.run("run", "-n", "3", "--launcher", "mpirun", "--min-workers", "2", "shrunk.py", "die", "10")
    assert "rank 1 of 3 died; the other 2 go on without a restart, from step 10" in done.err
    found = finished(done)
    first = job.run("run", "-n", "3", "--launcher", "mpirun", "shrunk.py", "stop", "10")
    assert first.exit_code == 3, first.err
    assert found == finished(job.run("run", "-n", "2", "--launcher", "mpirun", "shrunk.py", "stop", "10"))


def test_it_grows_back_when_it_is_asked_to(job, undisturbed):
    if not undisturbed:
        undisturbed["end"] = run_alone(job)
    bounds = ["--min-workers", "1", "--max-restarts", "1"]
    process = job.start("run", "-n", "3", "--launcher", "mpirun", *bounds, "restarted.py", str(EPOCHS), "files")
    await_step(job, process, 4)
    rank, _ = kill(job, process, random.Random(0))
    await_step(job, process, 10)
    process.send_signal(signal.SIGUSR2)
    done = job.finish(process)
    assert re.findall(r"finished .*", done.out) == [undisturbed["end"]], done.err
    assert f"rank {rank} of 3 died; the other 2 go on without a restart" in done.err
    assert re.search(r"disttrain: more workers can be started; the job goes on from step \d+, on 3 workers", done.err)
    check_ledger(job, EPOCHS, [3, 2, 3])


@pytest.mark.parametrize(
    ("how", "why"), [("both", "they are fewer than --min-workers 3"), ("sharded", "each had a part of the state")]
)
def test_where_the_others_cannot_go_on_the_job_starts_again(job, how, why):
    bounds = ["--min-workers", "3", "--max-restarts", "1"]
    done = job.run("run", "-n", "4", "--launcher", "mpirun", *bounds, "shrunk.py", "die", how, "9")
    assert f"cannot go on alone: {why}" in done.err
    cause = r"rank [12] of 4 was ended by SIGKILL, in step 8"
    assert re.search(rf"disttrain: restart 1 of 1, because {cause}; it goes on from step \d, on 4 workers", done.err)
    assert finished(done).startswith("4 ")


def test_without_min_workers_a_loss_ends_the_job(job):
    done = job.run("run", "-n", "2", "--launcher", "mpirun", "shrunk.py", "die", "5")
    assert done.exit_code == 128 + signal.SIGKILL
    assert "rank 1 of 2, on host" in done.err
