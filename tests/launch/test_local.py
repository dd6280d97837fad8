"""Workers of `--launcher local`: processes of this machine that communicate without MPI, by memory or by sockets."""

import signal
import socket
import stat
import subprocess
import sys

import pytest

JOIN = """
import os, signal, sys, time
import numpy as np
import disttrain as dt
comm = dt.init()
"""
# Rank 1 ends, as the others wait for it.
ENDS = (
    JOIN
    + """
comm.all_reduce(np.ones(3))
if comm.rank == 1:
    time.sleep(0.3)
    with open("failed_s", "w") as file: file.write(str(time.monotonic()))
    {failure}
{wait}
"""
)
WAITS = {
    "a short sum": "comm.all_reduce(np.ones(3))",
    "a long sum": "comm.all_reduce(comm.allocate(10**6))",
    "a barrier": "comm.barrier()",
    "a message": "comm.recv(np.zeros(3), 1) if comm.rank == 0 else comm.barrier()",
    "a message to it": "comm.send(np.zeros(10**7), 1) if comm.rank == 0 else comm.barrier()",
}
OVER_TCP = ["a short sum", "a message to it"]
each_wait = pytest.mark.parametrize(
    ("transport", "wait"),
    [("shm", wait) for wait in WAITS.values()] + [("tcp", WAITS[name]) for name in OVER_TCP],
    ids=[*WAITS, *(f"{name}, over tcp" for name in OVER_TCP)],
)


def run(program, text, workers=3, transport="shm"):
    apart = 'import os; os.environ["DISTTRAIN_HOST"] = os.environ["DISTTRAIN_RANK"]\n' if transport == "tcp" else ""
    options = ("-n", str(workers), "--launcher", "local", "--transport", transport)
    return program.run("run", *options, program.script(apart + text))


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_workers_know_their_place_and_load_no_mpi(program, transport):
    text = JOIN + "print(comm.transport, comm.rank, comm.world_size, 'mpi4py' in sys.modules)"
    done = run(program, text, 4, transport)
    assert done.exit_code == 0, done.err
    assert sorted(done.out.splitlines()) == [f"[{rank}] {transport} {rank} 4 False" for rank in range(4)]


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_model_is_trained_without_mpi(program, transport):
    text = JOIN + (
        "model = dt.Sequential([dt.layers.Dense(3, input_shape=(4,))])\n"
        "model.compile('sgd', 'mse')\n"
        "x = np.random.default_rng(0).standard_normal((20, 4), np.float32)\n"
        "model.fit(x, x[:, :3], batch_size=5, epochs=2, verbose=0)\n"
        "print(dt.state_digest(model))"
    )
    done = run(program, text, transport=transport)
    assert done.exit_code == 0, done.err
    assert len({line.partition(" ")[2] for line in done.out.splitlines()}) == 1
    assert len(done.out.splitlines()) == 3


@each_wait
def test_an_exception_on_one_rank_ends_the_job_within_two_seconds(program, transport, wait):
    done = run(program, ENDS.format(failure="raise ValueError('only here')", wait=wait), transport=transport)
    assert done.time_s - float(program.await_file("failed_s")) < 2.0
    assert done.exit_code == 1
    host = socket.gethostname()
    assert done.err.startswith(f"disttrain: rank 1 of 3 failed first, on host {host}, exit code 1:\nTraceback")
    assert f"\nValueError: only here\nrank 1 of 3, host {host}\n" in done.err


@each_wait
def test_a_rank_that_is_killed_is_named(program, transport, wait):
    done = run(program, ENDS.format(failure="os.kill(os.getpid(), signal.SIGKILL)", wait=wait), transport=transport)
    assert done.time_s - float(program.await_file("failed_s")) < 2.0
    assert done.exit_code == 128 + signal.SIGKILL
    words = f"disttrain: rank 1 of 3, on host {socket.gethostname()}, was ended by signal 9 (SIGKILL)"
    assert words in done.err


@each_wait
def test_a_rank_that_ends_early_is_named_by_those_that_wait_for_it(program, transport, wait):
    done = run(program, ENDS.format(failure="sys.exit(0)", wait=wait), transport=transport)
    assert done.exit_code == 1
    assert "rank 1 has left the job" in done.err or "rank 1 has ended, with a message" in done.err
    assert "CommError" in done.err


def test_abort_ends_all_ranks(program):
    done = run(program, ENDS.format(failure="comm.abort(7)", wait="comm.barrier()"))
    assert done.exit_code == 7


def test_ctrl_c_reaches_a_worker_that_waits_in_a_sum(program):
    text = JOIN + (
        "try:\n"
        "    open(f'waiting.{comm.rank}', 'w').write('yes')\n"
        "    if comm.rank == 0:\n"
        "        comm.all_reduce(np.ones(3))\n"
        "    time.sleep(60)\n"
        "except KeyboardInterrupt:\n"
        "    open(f'told.{comm.rank}', 'w').write('yes')\n"
        "    raise"
    )
    started = program.start("run", "-n", "2", "--launcher", "local", program.script(text))
    for rank in range(2):
        program.await_file(f"waiting.{rank}")
    started.send_signal(signal.SIGINT)
    assert program.finish(started).exit_code == 130
    assert program.await_file("told.0") == program.await_file("told.1") == "yes"


@pytest.mark.parametrize("ending", ["", "os.kill(os.getpid(), signal.SIGKILL)"], ids=["well", "killed"])
def test_dev_shm_may_be_small_and_nothing_is_left_in_it(program, ending):
    text = f"a = comm.allocate(10**6)\na[:] = 1\nprint(comm.all_reduce(a)[-1], flush=True)\ncomm.barrier()\n{ending}"
    script = program.script(JOIN + text)
    mount = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && "$@"; echo $? $(ls -A /dev/shm)'
    inside = ["unshare", "--mount", "sh", "-c", mount, "sh"]
    options = {"cwd": program.folder, "env": program.env, "capture_output": True, "text": True, "timeout": 60}
    if subprocess.run([*inside, "true"], check=False, **options).stdout != "0\n":
        pytest.skip("this user may not make a mount namespace")
    command = [*inside, sys.executable, "-P", "-c", "from launch.cli import main; main()"]
    done = subprocess.run([*command, "run", "-n", "2", "--launcher", "local", script], check=False, **options)
    *sums, end = done.stdout.splitlines()
    assert sorted(sums) == ["[0] 2.0", "[1] 2.0"]
    assert end == ("137" if ending else "0"), done.stderr


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_folder_that_others_can_write_to_is_refused(program, tmp_path, mode):
    folder = tmp_path / "job"
    folder.mkdir()
    folder.chmod(mode)
    assert stat.S_IMODE(folder.stat().st_mode) == mode
    command = [sys.executable, "-c", "import disttrain as dt; dt.init('shm')"]
    environment = {**program.env, "DISTTRAIN_JOB_DIR": str(folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "LaunchError: others can write to the job's folder" in done.stderr


def test_without_a_job_the_transport_says_how_to_start_one(program):
    command = [sys.executable, "-c", "import disttrain as dt; dt.init('shm')"]
    done = subprocess.run(command, env=program.env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "disttrain run --launcher local -n N script.py" in done.stderr.splitlines()[-1]
