"""Python functions on ranks that Ray has placed, by itself, by Ray Train, and by Ray Tune."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ray.test_run import HOST

pytestmark = pytest.mark.timeout(600)


def python(program, *arguments):
    """Return what Python prints, in the program's folder."""
    options = {"cwd": program.folder, "env": program.env, "capture_output": True, "text": True, "timeout": 400}
    done = subprocess.run([sys.executable, *arguments], check=False, **options)
    assert done.returncode == 0, done.stderr
    for left in Path(program.env["TMPDIR"]).iterdir():  # Ray's logs, and the folder of a rank that was killed
        shutil.rmtree(left)
    return done.stdout


FUNCTIONS = """
import numpy as np
import disttrain as dt

def adds(n):
    comm = dt.init()
    return comm.rank, comm.world_size, float(comm.all_reduce(np.ones(n))[0])

def fails(rank):
    if dt.init().rank == rank:
        raise ValueError(f"only on {rank}")
    dt.init().barrier()

def leaves():
    if dt.init().rank == 1:
        import os
        os._exit(0)
    dt.init().barrier()

if __name__ == "__main__":
    print(dt.ray.train(adds, (3,), workers=2))  # on a cluster of its own; the others, on this one
    import ray
    ray.init(num_cpus=2, object_store_memory=80 << 20, include_dashboard=False)
    for call in ({"function": fails, "args": (1,)}, {"function": leaves}):
        try:
            dt.ray.train(**call, workers=2)
        except Exception as error:
            print(isinstance(error, ValueError), isinstance(error, dt.errors.CommError), str(error))
"""


def test_a_function_is_called_on_all_ranks_and_what_rank_0_returns_is_returned(program):
    sums, *failures = python(program, program.script(FUNCTIONS)).split("\n", 1)
    assert sums == "(0, 2, 2.0)"
    assert "True False" in failures[0]
    assert "in fails" in failures[0]  # its traceback there
    assert "ValueError: only on 1" in failures[0]
    assert f"False True rank 1 of 2, on host {HOST}, pid" in failures[0]


TRAINER = """
import os, signal, sys
import numpy as np
import disttrain as dt

class Die(dt.callbacks.Callback):
    def on_train_batch_end(self, batch, logs):
        died = os.path.join(self.model.folder, "died")
        if dt.init().rank == 1 and self.model.optimizer.steps == 13 and not os.path.exists(died):
            import ray.train
            ray.train.get_all_reported_checkpoints()  # waits until Ray has the one of the first epoch
            open(died, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)

def fit(epochs, callbacks=(), folder=""):
    dt.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(60, 8))
    model = dt.Sequential([dt.layers.Dense(8, "relu", input_shape=(8,)), dt.layers.Dropout(0.2), dt.layers.Dense(3)])
    model.folder = folder
    model.compile("adam", "mse")
    steps = []
    count = dt.callbacks.Callback()
    count.on_train_batch_end = lambda batch, logs: steps.append(model.optimizer.steps)
    model.fit(x, x[:, :3], 8, epochs, verbose=0, callbacks=[count, *callbacks], reproducible=True)
    return dt.state_digest(model), steps

def loop(config):
    digest, steps = fit(config["epochs"], [Die(), dt.ray.Report()], config["folder"])
    comm = dt.init()
    return comm.world_size, comm.transport, steps[0], steps[-1], digest

def trained(epochs):
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    run = RunConfig(name="run", storage_path=os.path.abspath("kept"), failure_config=FailureConfig(max_failures=1))
    trainer = dt.ray.DisttrainTrainer(
        loop, train_loop_config={"epochs": epochs, "folder": os.getcwd()},
        scaling_config=ScalingConfig(num_workers=2), run_config=run,
    )
    return trainer.fit()

if __name__ == "__main__":
    import ray
    ray.init(num_cpus=2, object_store_memory=80 << 20, include_dashboard=False)
    first = trained(2)
    later = trained(3)
    for result in (first, later):
        print(*result.return_value, result.metrics["loss"])
    print("kept", dt.checkpoint.load(later.checkpoint.path).values["training"]["epoch"])
    print(*(fit(epochs)[0] for epochs in (2, 3)))
"""


def test_ray_train_goes_on_from_its_checkpoint_after_a_kill_and_in_a_later_run(program):
    *lines, kept, alone = python(program, program.script(TRAINER)).splitlines()[-4:]
    first, later = (line.split() for line in lines)
    assert first[:4] == ["2", "tcp", "9", "16"]  # 8 steps an epoch; rank 1 was killed in the second
    assert later[:4] == ["2", "tcp", "17", "24"]
    assert [first[4], later[4]] == alone.split()
    assert kept == "kept 3"


def test_ray_tune_finds_the_better_learning_rate(program):
    shutil.copy(Path(__file__).parents[2] / "examples/ray_tune.py", program.folder)
    out = python(program, "ray_tune.py", "--small")
    assert len(re.findall(r"^learning rate ", out, re.MULTILINE)) == 4
    assert "the best learning rate is 0.1" in out
