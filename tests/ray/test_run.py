"""Workers that are actors of Ray: the same words, codes and bits as under other launchers."""

import contextlib
import os
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

from disttrain.errors import LaunchError
from launch.mpirun import find_mpi

pytestmark = pytest.mark.timeout(600)

JOIN = """
import os, signal, sys, time
import numpy as np
import disttrain as dt
comm = dt.init()
"""
HOST = socket.gethostname()


def run(program, text, workers=2, *options):
    return program.run("run", "-n", str(workers), "--launcher", "ray", *options, program.script(text), "--name", "a b")


def test_a_script_runs_as_main_in_each_actor(program):
    text = JOIN + (
        "import ray\n"
        "assert ray.get_runtime_context().get_actor_id()\n"
        "total = comm.all_reduce(np.ones(3))[0]\n"
        "print(__name__, sys.argv, os.getcwd(), comm.transport, comm.rank, comm.world_size, total)\n"
        "print('err', file=sys.stderr)"
    )
    done = run(program, text)
    assert done.exit_code == 0, done.err
    words = f"__main__ ['script.py', '--name', 'a b'] {program.folder} tcp"
    assert sorted(done.out.splitlines()) == [f"[{rank}] {words} {rank} 2 2.0" for rank in range(2)]
    assert sorted(done.err.splitlines()) == ["[0] err", "[1] err"]


def test_without_an_mpi_the_same_command_says_so_and_has_ray_start_the_workers(program):
    with contextlib.suppress(LaunchError):
        find_mpi()
        pytest.skip("there is an MPI here")
    done = program.run("run", "-n", "2", program.script(JOIN + "import ray\nprint(ray.is_initialized(), comm.rank)"))
    assert done.exit_code == 0, done.err
    assert sorted(done.out.splitlines()) == ["[0] True 0", "[1] True 1"]
    words = "disttrain: there is no MPI here, so Ray starts the workers; --launcher local does without\n"
    assert done.err.startswith(words)


def test_ray_listens_on_loopback_behind_a_token(program):
    text = JOIN + (
        "import psutil\n"
        "family = psutil.Process(os.getppid()).parent().children(recursive=True)\n"
        "found = {each.laddr.ip for one in family for each in one.net_connections('tcp') if each.status == 'LISTEN'}\n"
        "print(sorted(found), os.environ['RAY_AUTH_MODE'], len(os.environ['RAY_AUTH_TOKEN']))\n"
    )
    done = run(program, text, 1)
    assert done.exit_code == 0, done.err
    assert done.out == "['127.0.0.1', '::ffff:127.0.0.1'] token 64\n"


@pytest.mark.parametrize(
    ("failure", "code"), [("raise ValueError('only here')", 1), ("sys.exit(7)", 7)], ids=["exception", "exit"]
)
def test_who_fails_first_is_told_last_with_its_own_traceback(program, failure, code):
    text = JOIN + (
        f"if comm.rank == 1:\n    open('failed_s', 'w').write(str(time.monotonic()))\n    {failure}\ncomm.barrier()"
    )
    done = run(program, text)
    assert done.exit_code == code
    assert done.time_s - float(program.await_file("failed_s")) < 4.0  # 2 s, and as long for Ray's own end
    assert f"disttrain: rank 1 of 2 failed first, on host {HOST}, exit code {code}:\n" in done.err
    assert f"{program.folder}/script.py" in done.err
    assert f"rank 1 of 2, host {HOST}\nMeanwhile rank 0: " in done.err
    assert "ray" not in done.err.partition("exit code")[2]  # none of its frames, no words of its own
    if code == 1:
        assert "\nValueError: only here\n" in done.err


def test_an_actor_that_is_killed_in_a_step_is_named_within_two_seconds(program):
    text = JOIN + (
        "model = dt.Sequential([dt.layers.Dense(3, input_shape=(4,))])\n"
        "model.compile('sgd', 'mse')\n"
        "x = np.random.default_rng(0).standard_normal((20, 4), np.float32)\n"
        "class Die(dt.callbacks.Callback):\n"
        "    def on_train_batch_end(self, batch, logs=None):\n"
        "        if comm.rank == 1 and batch == 3:\n"
        "            open('killed_s', 'w').write(str(time.monotonic()))\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "model.fit(x, x[:, :3], batch_size=5, epochs=9, verbose=0, callbacks=[Die()])"
    )
    done = run(program, text)
    assert done.time_s - float(program.await_file("killed_s")) < 4.0  # 2 s, and as long for Ray's own end
    assert done.exit_code == 128 + signal.SIGKILL
    assert f"disttrain: rank 1 of 2, on host {HOST}, was ended by signal 9 (SIGKILL)" in done.err
    assert "It was at: callback, after step 3" in done.err
    assert "Meanwhile rank 0: " in done.err


def test_an_exit_code_that_python_cannot_handle_is_told(program):
    done = run(program, JOIN + "if comm.rank == 1: os._exit(5)\ncomm.barrier()")
    assert done.exit_code == 5
    assert f"disttrain: rank 1 of 2, on host {HOST}, ended with exit code 5, without an exception" in done.err


def test_exit_handlers_run_and_a_rank_that_ends_early_is_named(program):
    text = JOIN + (
        "import atexit\natexit.register(lambda: open('left', 'w').write('yes'))\nif comm.rank == 0: comm.barrier()"
    )
    done = run(program, text)
    assert done.exit_code == 1
    assert "CommError: rank 1 has left the job" in done.err
    assert program.await_file("left") == "yes"


def test_a_request_to_end_reaches_the_script(program):
    text = JOIN + (
        "open(f'here.{comm.rank}', 'w').write('yes')\n"
        "try:\n"
        "    time.sleep(60)\n"
        "except KeyboardInterrupt:\n"
        "    open(f'told.{comm.rank}', 'w').write('yes')\n"
        "    raise\n"
    )
    started = program.start("run", "-n", "2", "--launcher", "ray", program.script(text))
    for rank in range(2):
        program.await_file(f"here.{rank}")
    started.send_signal(signal.SIGINT)
    done = program.finish(started)
    assert done.exit_code == 130, done.err
    assert program.await_file("told.0") == program.await_file("told.1") == "yes"


TRAIN = f"""
import sys
sys.path.append({str(Path(__file__).parents[2] / "examples")!r})
import digits
import disttrain as dt
dt.utils.set_random_seed(0)
(x, y), _ = dt.datasets.digits.load_data()
model = digits.build_model()
model.fit(x[:640, ..., None], y[:640], batch_size=64, epochs=1, verbose=0, reproducible=True)
print(dt.init().world_size, dt.state_digest(model))
"""


def test_weights_have_the_same_bits_as_under_another_launcher(program):
    done = run(program, TRAIN)
    assert done.exit_code == 0, done.err
    local = program.run("run", "-n", "2", "--launcher", "local", program.script(TRAIN))
    assert local.exit_code == 0, local.err
    assert sorted(done.out.splitlines()) == sorted(local.out.splitlines())
    assert done.out.startswith(("[0] 2 ", "[1] 2 "))


def test_a_job_whose_actor_was_killed_in_a_step_goes_on_from_its_last_one_to_the_same_bits(program):
    shutil.copy(Path(__file__).parents[1] / "chaos/restarted.py", program.folder)
    command = ("run", "-n", "2", "--launcher", "ray", "--max-restarts", "1", "restarted.py", "4", "saved")
    job = program.start(*command)
    while (text := program.await_file("steps.1")).count("\n") < 12:
        time.sleep(0.02)
    os.kill(int(text.split()[1]), signal.SIGKILL)
    killed_s = time.monotonic()
    done = program.finish(job)
    assert done.exit_code == 0, done.err
    words = "disttrain: restart 1 of 1, because rank 1 of 2 was ended by SIGKILL, in step "
    goes_on = re.search(re.escape(words) + r"\d+; it goes on from step (\d+), on 2 workers\n", done.err)
    lines = [line.split() for line in program.await_file("steps.1").splitlines()]
    attempts = [number for number, line in enumerate(lines) if line[0] == "pid"]
    again = lines[attempts[1] + 1 :]
    assert [int(step) for step, _ in again] == list(range(int(goes_on[1]) + 1, 33))
    pause_s = float(again[0][1]) - killed_s
    print(f"from the kill to the next step: {pause_s:.1f} s")
    assert pause_s < 60  # 15 s are promised, of a machine with nothing else to do
    local = program.run("run", "-n", "2", "--launcher", "local", "restarted.py", "4")
    assert re.search("finished .*", done.out)[0] == re.search("finished .*", local.out)[0]
    audited = program.run("ckpt", "audit", "saved")
    assert audited.exit_code == 0, audited
    assert "each of 60 samples exactly once in epochs 0 to 3" in audited.out
