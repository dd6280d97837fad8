"""The program `disttrain` in a folder of its own, where Ray is installed; clusters that tests start, and end."""

import contextlib
import importlib.metadata
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from tests.launch.conftest import Program


@pytest.fixture(autouse=True)
def ray_installed():
    try:
        importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("Ray is not installed here; make ray brings it")


@pytest.fixture
def program(tmp_path, ray_installed):
    """A program, with a short path for temporary files: Ray's sockets are there."""
    program = Program(tmp_path)
    program.limit_s = 300.0
    program.env = {name: value for name, value in program.env.items() if not name.startswith("RAY_")}
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        program.env["TMPDIR"] = folder
        yield program
        assert list(Path(folder).iterdir()) == []
    assert program.left() == []


@pytest.fixture
def files(program):
    """A folder for the files of a cluster, whose token the program has."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        token = Path(folder, "token")
        token.touch(0o600)
        token.write_text(program.token)
        program.env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        try:
            yield Path(folder)
        finally:
            for process in psutil.process_iter():
                with contextlib.suppress(psutil.Error):
                    if process.environ().get("TEST_TOKEN") == program.token:
                        process.kill()
                        process.wait(10)


@pytest.fixture
def nodes(program, files):
    """Return what starts a cluster of a node for each number of CPUs; a line to it kills the last node."""

    def start(*cpus):
        command = [sys.executable, "-m", "tests.ray.nodes", *map(str, cpus)]
        options = {"cwd": Path(__file__).parents[2], "env": program.env | {"TMPDIR": str(files)}, "text": True}
        with open(files / "errors", "w") as errors:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, **options)
        held.append(process)
        address = process.stdout.readline().strip()
        assert address, (files / "errors").read_text()
        return address, process

    held = []
    yield start
    for process in held:
        process.stdin.close()
        process.wait(60)
        process.stdout.close()


@pytest.fixture
def two_hosts(program, files):
    """Return what starts a cluster of this host, and of one of another name, and returns its address; a CPU each.

    The other host has temporary files of its own, and nothing in a folder that is to be hidden.
    """
    from ray.util import get_node_ip_address

    def start(hidden=""):
        mounts = "".join(f" && mount -t tmpfs tmpfs {folder}" for folder in (program.env["TMPDIR"], hidden) if folder)
        elsewhere = ["unshare", "--mount", "--uts", "sh", "-c", f'hostname other{mounts} && exec "$@"', "sh"]
        if subprocess.run([*elsewhere, "true"], check=False, capture_output=True).returncode:
            pytest.skip("this user may not make a mount namespace")
        with socket.create_server(("", 0)) as probe:
            port = probe.getsockname()[1]
        address = f"{get_node_ip_address()}:{port}"
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=1", "--disable-usage-stats"]
        head = [f"--temp-dir={files}/head", "--head", f"--port={port}", "--include-dashboard=false"]
        for each in ([*command, *head], [*elsewhere, *command, f"--address={address}"]):
            done = subprocess.run(each, check=False, env=program.env, capture_output=True, text=True, timeout=200)
            assert done.returncode == 0, done.stdout + done.stderr
        return address

    return start


def remove_last(process):
    """Kill the last node of a cluster."""
    process.stdin.write("remove\n")
    process.stdin.flush()
    assert process.stdout.readline() == "removed\n"
