"""`ray job submit -- disttrain run`, on a head that `ray start --head` has started."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ray.test_run import JOIN

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def head(program, files):
    """The address at which the head of a cluster of two CPUs takes jobs."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--port=0", "--num-cpus=2"]
    options = [f"--temp-dir={files}/head", f"--dashboard-port={port}", "--disable-usage-stats"]
    environment = program.env | {"TMPDIR": str(files)}
    subprocess.run([*start, *options], check=True, env=environment, capture_output=True, timeout=200)
    return f"http://127.0.0.1:{port}"


def submit(program, head, script):
    """Return exit code and output of a job that has been submitted, which works in a copy of the program's folder."""
    ray, disttrain = ([sys.executable, "-m", "ray.scripts.scripts"], str(Path(sys.executable).with_name("disttrain")))
    job = [*ray, "job", "submit", "--address", head, "--working-dir", str(program.folder), "--", disttrain, "run"]
    options = {"env": program.env, "text": True, "timeout": 200, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run([*job, "--launcher", "ray", "-n", "2", script, "--name", "ab"], check=False, **options)
    return done.returncode, done.stdout


def test_a_submitted_job_runs_on_the_cluster_that_it_was_submitted_to(program, head):
    script = program.script(JOIN + "print(sys.argv[1:], comm.world_size, 'runtime_resources' in os.getcwd())")
    code, out = submit(program, head, script)
    assert code == 0, out
    for rank in range(2):
        assert f"[{rank}] ['--name', 'ab'] 2 True" in out
    code, out = submit(program, head, program.script("raise ValueError('only here')", "fails.py"))
    assert code == 1, out
    assert "failed first, on host" in out
    assert "\nValueError: only here\n" in out
