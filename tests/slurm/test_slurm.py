"""`cluster/slurm/train.sbatch` on a real Slurm of two nodes: trains, comes back when requeued, ends when asked."""

import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.launch.test_away import ENDS, TRAIN
from tests.slurm.cluster import Cluster, NoSlurmError

pytestmark = [pytest.mark.long, pytest.mark.timeout(400)]

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SBATCH = ROOT / "cluster" / "slurm" / "train.sbatch"
LIMIT_S = 120.0
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


class Jobs:
    """Jobs of a cluster, in a folder."""

    def __init__(self, cluster, folder):
        self.cluster, self.folder = cluster, folder
        path = f"{sys.prefix}/bin:{os.environ['PATH']}"
        cluster.env |= {"PATH": path, "PYTHONPATH": str(ROOT)}

    def slurm(self, *argv, code=0):
        argv = ["env", f"--chdir={self.folder}", *map(str, argv)]
        done = self.cluster.run(*argv)
        assert done.returncode == code, done.stderr
        return done.stdout.strip()

    def submit(self, *arguments, options=()):
        return self.slurm("sbatch", "--parsable", *options, SBATCH, *arguments)

    def output(self, job):
        file = self.folder / f"train-{job}.out"
        return file.read_text() if file.exists() else ""

    def facts(self, job):
        return dict(word.partition("=")[::2] for word in self.slurm("scontrol", "show", "job", "-o", job).split())

    def wait(self, job, text):
        self.await_true(lambda: re.search(text, self.output(job)), job, text)

    def end(self, job, *states):
        self.await_true(lambda: self.facts(job)["JobState"] in states, job, states)
        self.await_true(lambda: not self.slurm("squeue", "-h", "-j", job, "-o", "%T"), job, "its end")
        return self.facts(job)

    def await_true(self, holds, job, what):
        end_s = time.monotonic() + LIMIT_S
        while not holds():
            facts = self.facts(job)
            is_over = facts["JobState"] in ENDED and not holds()
            if is_over or time.monotonic() > end_s:
                pytest.fail(f"no {what}: {facts}\n{self.output(job)}")
            time.sleep(0.2)

    def checkpoints(self, name):
        return sorted(path.name for path in (self.folder / name).glob("checkpoint-*"))


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    with contextlib.ExitStack() as stack:
        try:
            cluster = stack.enter_context(Cluster())
        except NoSlurmError as error:
            pytest.skip(str(error))
        yield Jobs(cluster, folder)


@pytest.fixture(scope="module")
def undisturbed(jobs):
    """The weights that a run on this host ends with, which nobody disturbs."""
    command = [
        Path(sys.prefix, "bin", "disttrain"),
        "run",
        "-n",
        "2",
        "--launcher",
        "local",
        HERE / "train.py",
        "calm",
        "12",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=jobs.folder, env=env, check=True, timeout=120, stdout=subprocess.DEVNULL)
    return weights(jobs, "calm")


def weights(jobs, name):
    with np.load(jobs.folder / f"{name}.npz") as file:
        return [file[key] for key in file.files]


def test_the_script_trains_on_both_nodes(jobs):
    job = jobs.submit(HERE / "train.py", "runs", 2)
    assert jobs.end(job, "COMPLETED")["ExitCode"] == "0:0"
    lines = jobs.output(job).splitlines()
    assert "[0] done on node1" in lines
    assert "[1] done on node2" in lines


def test_a_requeued_job_goes_on_and_ends_as_one_that_nobody_disturbed(jobs, undisturbed):
    job = jobs.submit(HERE / "train.py", "requeued", 12)
    jobs.wait(job, "epoch 3")
    jobs.slurm("scontrol", "requeue", job)
    facts = jobs.end(job, "COMPLETED")
    out = jobs.output(job)
    assert facts["Restarts"] == "1"
    assert "[0] begins, restart 0" in out
    assert "[0] begins, restart 1" in out
    assert re.findall(r"epoch (\d+)", out) == [str(epoch) for epoch in range(12)]
    for found, expected in zip(weights(jobs, "requeued"), undisturbed, strict=True):
        # Within a node sums are formed in shared memory, between two by messages: two terms, the same in either order.
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("command", "state", "reason"),
    [(["scancel", "--signal=TERM"], "FAILED", "SIGTERM"), (["scancel"], "CANCELLED", "SIG(TERM|USR1)")],
)
def test_a_cancelled_job_leaves_a_checkpoint_and_does_not_come_back(jobs, command, state, reason):
    name = f"cancelled-{len(command)}"
    job = jobs.submit(HERE / "train.py", name, 1000)
    jobs.wait(job, "epoch 3")
    jobs.slurm(*command, job)
    facts = jobs.end(job, state)
    assert facts["Restarts"] == "0"
    assert re.search(f"ends with exit code 75: rank 0: received {reason}", jobs.output(job))
    steps = int(re.findall(r"training ends after step (\d+)", jobs.output(job))[0])
    assert jobs.checkpoints(name)
    done = jobs.slurm(Path(sys.prefix, "bin", "disttrain"), "ckpt", "ls", name)
    assert re.search(rf"\b{steps}\b", done), done


def test_a_preempted_job_comes_back(jobs):
    job = jobs.submit(HERE / "train.py", "preempted", 12)
    jobs.wait(job, "epoch 3")
    jobs.slurm("srun", "--partition=urgent", "--exclusive", "--nodes=2", "--time=1", "true")
    facts = jobs.end(job, "COMPLETED")
    assert facts["Restarts"] == "1"
    assert "ends with exit code 75: rank 0: received SIGTERM" in jobs.output(job)
    assert re.findall(r"epoch (\d+)", jobs.output(job)) == [str(epoch) for epoch in range(12)]


def test_a_job_whose_time_is_up_comes_back(jobs):
    job = jobs.submit(HERE / "train.py", "limited", 1000, options=["--signal=USR1@120"])
    jobs.wait(job, "epoch 3")
    minutes = int(jobs.slurm("squeue", "-h", "-j", job, "-O", "TimeUsed:.20").split(":")[-2])
    jobs.slurm("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes + 2}")  # 60 to 120 seconds are left
    jobs.wait(job, "ends with exit code 75: rank 0: received SIGUSR1")
    jobs.wait(job, "begins, restart 1")
    jobs.slurm("scancel", job)
    jobs.end(job, "CANCELLED")


@pytest.mark.parametrize("deed", ENDS)
def test_whatever_ends_a_rank_on_another_node_is_named_with_its_place_and_what_the_other_did(jobs, deed):
    (jobs.folder / "ends.py").write_text(TRAIN)
    job = jobs.submit("--hang-timeout", "3", "ends.py", deed)
    code, words = ENDS[deed]
    assert jobs.end(job, "FAILED")["ExitCode"] == f"{code}:0"
    for each in words:
        assert each.format(host="node2") in jobs.output(job)
    assert re.search(r"^Meanwhile rank 0: step 59, bucket 0; waits in all_reduce", jobs.output(job), re.MULTILINE)
    for host in range(2):
        assert jobs.cluster.run("ls", jobs.cluster.folder / "tmp", host=host).stdout == ""


def test_more_workers_than_tasks_are_refused(jobs):
    run = f"{sys.prefix}/bin/disttrain run --launcher slurm -n 3 {HERE / 'train.py'} x 1"
    job = jobs.slurm("sbatch", "--parsable", "--nodes=2", "--ntasks=2", "--output=train-%j.out", f"--wrap={run}")
    assert jobs.end(job, "FAILED")["ExitCode"] == "2:0"
    assert "the allocation has 2 task(s), and 3 workers are asked for: sbatch --ntasks 3" in jobs.output(job)
