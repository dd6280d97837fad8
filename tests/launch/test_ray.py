"""Workers that are actors of Ray: the same words, codes and bits as under other launchers."""

import contextlib
import importlib.metadata
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from disttrain.errors import ConfigError, LaunchError
from disttrain.ray.actor import Rank
from launch import mpirun, ray
from launch.job import Job, commands

try:
    importlib.metadata.version("ray")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("Ray is not installed here; make ray brings it", allow_module_level=True)

pytestmark = pytest.mark.timeout(180)

JOIN = """
import os, signal, sys, time
import numpy as np
import disttrain as dt
comm = dt.init()
"""
HOST = socket.gethostname()


@pytest.fixture
def program(program):
    """The same, with a short path for temporary files: Ray's sockets are there."""
    program.limit_s = 120.0
    program.env = {name: value for name, value in program.env.items() if not name.startswith("RAY_")}
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        program.env["TMPDIR"] = folder
        yield program
        assert list(Path(folder).iterdir()) == []


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


def test_ray_listens_on_loopback_behind_a_token(program):
    text = JOIN + (
        "import psutil, socket, pathlib, urllib.request\n"
        "family = psutil.Process(os.getppid()).parent().children(recursive=True)\n"
        "found = {each.laddr.ip for one in family for each in one.net_connections('tcp') if each.status == 'LISTEN'}\n"
        "token = pathlib.Path(os.environ['RAY_AUTH_TOKEN_PATH'])\n"
        "print(sorted(found), oct(token.stat().st_mode & 0o777), os.environ['RAY_AUTH_MODE'])\n"
    )
    done = run(program, text, 1)
    assert done.exit_code == 0, done.err
    assert done.out == "['127.0.0.1', '::ffff:127.0.0.1'] 0o600 token\n"


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


@pytest.fixture
def two_nodes(program):
    """The address of a cluster: this host, and one of another name with temporary files of its own; a CPU each."""
    from ray.util import get_node_ip_address

    inside = f'hostname other && mount -t tmpfs tmpfs {program.env["TMPDIR"]} && exec "$@"'
    elsewhere = ["unshare", "--mount", "--uts", "sh", "-c", inside, "sh"]
    if subprocess.run([*elsewhere, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this user may not make a mount namespace")
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as files, socket.create_server(("", 0)) as probe:
        token = Path(files, "token")
        token.touch(0o600)
        token.write_text(program.token)
        program.env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        address = f"{get_node_ip_address()}:{probe.getsockname()[1]}"
        probe.close()
        start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=1", "--disable-usage-stats"]
        head = [
            f"--temp-dir={files}/head",
            "--head",
            f"--port={address.rpartition(':')[2]}",
            "--include-dashboard=false",
        ]
        try:
            for command in ([*start, *head], [*elsewhere, *start, f"--address={address}"]):
                subprocess.run(command, check=True, env=program.env, capture_output=True, timeout=60)
            yield address
        finally:
            for process in psutil.process_iter():
                with contextlib.suppress(psutil.Error):
                    if process.environ().get("TEST_TOKEN") == program.token:
                        process.kill()
                        process.wait(10)


def test_what_happens_on_another_host_is_told_like_what_happens_here(program, two_nodes):
    text = JOIN + (
        "import socket\n"
        "comm.all_reduce(np.ones(3))\n"
        "print('on', socket.gethostname(), os.environ['DISTTRAIN_LOCAL_SIZE'], flush=True)\n"
        "if comm.rank == 1 and sys.argv[1] == 'raises': raise ValueError('only here')\n"
        "if comm.rank == 1 and sys.argv[1] == 'dies': os.kill(os.getpid(), signal.SIGKILL)\n"
        "if sys.argv[1] == 'waits':\n"
        "    try:\n"
        "        open(f'here.{comm.rank}', 'w').write('yes')\n"
        "        time.sleep(60)\n"
        "    except KeyboardInterrupt:\n"
        "        open(f'told.{comm.rank}', 'w').write('yes')\n"
        "comm.barrier()"
    )
    command = ("run", "-n", "2", "--launcher", "ray", "--address", two_nodes, program.script(text))
    done = program.run(*command, "works")
    assert done.exit_code == 0, done.err
    assert f"[0] on {HOST} 1\n" in done.out
    assert re.search(r"^\(rank 1 pid=\d+.*\) on other 1$", done.out, re.MULTILINE)
    done = program.run(*command, "raises")
    assert done.exit_code == 1
    assert "disttrain: rank 1 of 2 failed first, on host other, exit code 1:\nTraceback" in done.err
    assert "\nValueError: only here\nrank 1 of 2, host other\nMeanwhile rank 0: " in done.err
    done = program.run(*command, "dies")
    assert done.exit_code == 128 + signal.SIGKILL
    assert (
        "disttrain: rank 1 of 2 failed first, on host other, exit code 137:\nrank 1 of 2, on host other, pid"
        in done.err
    )
    started = program.start(*command, "waits")
    for rank in range(2):
        program.await_file(f"here.{rank}")
    started.send_signal(signal.SIGINT)
    program.finish(started)
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


def test_a_job_whose_actor_was_killed_goes_on_to_the_same_bits(program):
    dies = """
import os, signal
class Die(dt.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if dt.init().rank == 1 and batch == 5 and not os.path.exists("died"):
            open("died", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
model.fit("""
    text = TRAIN.replace("model.fit(", dies).replace("verbose", "callbacks=[Die()], verbose")
    done = run(program, text, 2, "--max-restarts", "1")
    assert done.exit_code == 0, done.err
    words = "disttrain: restart 1 of 1, because rank 1 of 2 was ended by SIGKILL, in step 5; it goes on from step "
    assert words in done.err
    local = program.run("run", "-n", "2", "--launcher", "local", program.script(TRAIN))
    assert sorted(done.out.splitlines()) == sorted(local.out.splitlines())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["-o", "gpus=1"], "asked for 2 CPUs, 2 GPUs; there are"),
        (["--address", "127.0.0.1:1"], "no Ray cluster answers at '127.0.0.1:1': "),
        (["--address", "auto"], "no Ray cluster answers at 'auto'"),
        (["--address", "nowhere"], "no Ray cluster answers at 'nowhere'"),
        (["-o", "placement=TIGHT"], "placement=TIGHT: expected one of PACK, SPREAD"),
        (["-o", "cpus=many"], "cpus=many: expected how many each worker has"),
        (["-o", "nodes=2"], "unknown option of --launcher ray: 'nodes'"),
        (["-o", "cpus"], "'cpus': expected NAME=VALUE"),
        (["--transport", "mpi"], "can have no MPI"),
    ],
)
def test_what_ray_cannot_start_is_refused_in_half_a_minute(program, options, reason):
    begin_s = time.monotonic()
    done = run(program, "open('started', 'w')", 2, *options)
    assert done.exit_code == 2
    assert reason in done.err
    assert "Traceback" not in done.err
    assert "disttrain: a rank" not in done.err
    assert not (program.folder / "started").exists()
    assert done.time_s - begin_s < 60  # it says so in 30; the machine may be slow


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
    print(dt.ray.train(adds, (3,), workers=2))
    for call in ({"function": fails, "args": (1,)}, {"function": leaves}):
        try:
            dt.ray.train(**call, workers=2)
        except Exception as error:
            print(isinstance(error, ValueError), isinstance(error, dt.errors.CommError), str(error))
"""


def test_a_function_is_called_on_all_ranks_and_what_rank_0_returns_is_returned(program):
    script = program.script(FUNCTIONS)
    options = {"cwd": program.folder, "env": program.env, "capture_output": True, "text": True, "timeout": 150}
    done = subprocess.run([sys.executable, script], check=False, **options)
    assert done.returncode == 0, done.stderr
    sums, *failures = done.stdout.split("\n", 1)
    assert sums == "(0, 2, 2.0)"
    assert "True False" in failures[0]
    assert "in fails" in failures[0]  # its traceback there
    assert "ValueError: only on 1" in failures[0]
    assert f"False True rank 1 of 2, on host {HOST}, pid" in failures[0]


def test_a_rank_says_what_it_does_not_find_on_its_node(tmp_path):
    rank = Rank(1)
    with pytest.raises(LaunchError, match=f"rank 1 cannot go to the script's folder {tmp_path}/no, on host {HOST}"):
        rank.arrive(f"{tmp_path}/no", "")
    here = Path.cwd()
    try:
        with pytest.raises(
            LaunchError, match=f"rank 1 does not find the script train.py in {tmp_path}, on host {HOST}"
        ):
            rank.arrive(str(tmp_path), "train.py")
    finally:
        os.chdir(here)


def test_without_an_mpi_several_workers_are_started_by_ray(monkeypatch, capsys):
    def find_mpi():
        raise LaunchError("there is no mpiexec")

    monkeypatch.setattr(mpirun, "find_mpi", find_mpi)
    (line,) = commands(Job(workers=4, script="train.py"))
    assert line.argv[1:4] == ("-P", "-m", "launch.actors")
    words = "disttrain: there is no MPI here, so Ray starts the workers; --launcher local does without\n"
    assert capsys.readouterr().err == words
    monkeypatch.setattr(ray, "is_installed", lambda: False)
    with pytest.raises(LaunchError, match="there is no mpiexec"):
        commands(Job(workers=4, script="train.py"))
    with pytest.raises(LaunchError, match=r"pip install 'disttrain\[ray\]'"):
        commands(Job(workers=4, script="train.py", launcher="ray"))


def test_options_of_ray_are_refused_by_other_launchers():
    with pytest.raises(ConfigError, match="unknown option of --launcher local: 'address'"):
        commands(Job(workers=2, script="s.py", launcher="local", options={"address": "auto"}))
