"""The supervisor's side of a far host, with a shell in the place of ssh: what it takes, refuses, and leaves behind."""

import contextlib
import json
import os
import shlex
import subprocess
import sys

import pytest

import disttrain
from disttrain import env
from launch import far
from launch.outpost import message
from launch.report import REFUSAL, read_reports
from launch.worker import PIPES

pytestmark = pytest.mark.timeout(60)

HELLO = {"version": disttrain.__version__, "address": "10.0.0.1", "problem": ""}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return what runs a shell command as ranks 2 and 3 of 4 on `node2`: its exit code, and what rank 2 has written."""
    monkeypatch.setenv(env.JOB_DIR, str(tmp_path))
    with contextlib.ExitStack() as stack:
        pipes = {}
        for rank in range(4):
            for name in PIPES:
                os.mkfifo(tmp_path / f"{name}.{rank}")
                pipes[name, rank] = os.open(tmp_path / f"{name}.{rank}", os.O_RDONLY | os.O_NONBLOCK)
                stack.callback(os.close, pipes[name, rank])

        def run(*said, then="true", hosts=1):
            lines = b"".join(each if isinstance(each, bytes) else message(*each) for each in said).decode()
            code = far.main(["2-3/4", "node2", str(hosts), "sh", "-c", f"printf %s {shlex.quote(lines)}; {then}"])
            try:
                return code, os.read(pipes["out", 2], 1 << 16)
            except BlockingIOError:
                return code, b""

        yield run


def refusal(folder):
    return (folder / REFUSAL).read_text()


def test_what_ranks_write_and_leave_is_where_the_supervisor_looks(run, tmp_path):
    report = {"rank": 2, "world_size": 4, "host": "node2", "time_s": 1e9, "exit_code": 3, "text": "why\n"}
    said = [b"Welcome!\n", ("hello", HELLO), ("out", 2, "caf\xe9\n"), ("file", "exchange.0.3", "[1]")]
    code, out = run(*said, ("file", "report.2.json", json.dumps(report)), ("alive", 2, "!"), ("end", 3))
    assert (code, out) == (3, b"caf\xe9\n")
    assert (tmp_path / "exchange.0.3").read_text() == "[1]"
    (found,) = read_reports(tmp_path)
    assert found.text == "why\n"
    assert found.time_s < 1e9  # by the clock of this host
    assert (tmp_path / "host.2").exists()


@pytest.mark.parametrize(
    "name", ["../evil", "/evil", "refusal", "exchange.0.1", "report.1.json", "proxy.2", "a/report.2.json"]
)
def test_a_host_leaves_no_other_files_than_those_of_its_ranks(run, tmp_path, name):
    code, _ = run(("hello", HELLO), ("file", name, "{}"))
    assert code == 2
    assert refusal(tmp_path) == f"host node2 sends a file {name!r}, which is none of its ranks'"


@pytest.mark.parametrize(
    ("hello", "words"),
    [
        ({"version": "0.0.1"}, f"host node2 has disttrain 0.0.1, expected {disttrain.__version__}"),
        ({"problem": "does not have the script x.py in /work"}, "host node2 does not have the script x.py in /work"),
    ],
)
def test_a_host_that_lacks_something_is_refused(run, tmp_path, hello, words):
    code, _ = run(("hello", {**HELLO, **hello}))
    assert code == 2
    assert refusal(tmp_path).startswith(words)


@pytest.mark.parametrize(
    ("then", "words"),
    [
        ("echo no route >&2; exit 255", "host node2 cannot be reached by ssh: no route; `ssh node2 true` must work"),
        ("cd /nowhere", "host node2 cannot start workers: its shell ended with exit code"),
    ],
)
def test_a_shell_that_does_not_come_to_workers_is_quoted(run, tmp_path, then, words):
    code, _ = run(then=then)
    assert code == 2
    assert refusal(tmp_path).startswith(words)


def test_without_a_supervisor_ranks_speak_to_the_shell(tmp_path):
    report = {"rank": 2, "world_size": 4, "host": "node2", "time_s": 1.0, "exit_code": 3, "text": "why\n"}
    said = [("hello", HELLO), ("out", 2, "loss 0.9\n"), ("err", 2, "warning\n")]
    said += [("file", "report.2.json", json.dumps(report)), ("alive", 2, "!"), ("end", 3)]
    lines = shlex.quote(b"".join(message(*each) for each in said).decode())
    command = [sys.executable, "-P", "-m", "launch.far", "2-3/4", "node2", "1", "sh", "-c", f"printf %s {lines}"]
    environ = {**os.environ, env.JOB_DIR: str(tmp_path)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "loss 0.9\n")
    assert done.stderr.splitlines() == ["warning", "why"]


def test_a_host_that_does_not_answer_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(far, "HELLO_S", 0.2)
    code, _ = run(then="exec sleep 60")
    assert code == 2
    assert refusal(tmp_path) == "host node2 has not answered within 0 s"


def test_a_host_that_only_this_one_reaches_is_refused_beside_others(run, tmp_path):
    (tmp_path / "host.0").write_text(json.dumps(["node1", "10.0.0.2"]))
    code, _ = run(("hello", {**HELLO, "address": "127.0.0.1"}), then="exec sleep 60", hosts=2)
    assert code == 2
    assert refusal(tmp_path).startswith("host node2 was reached at 127.0.0.1, where other hosts do not reach it")


def test_ranks_of_a_lost_host_are_reported(run, tmp_path):
    code, _ = run(("hello", HELLO), ("alive", 3, "."), then="echo broken >&2; exit 255")
    assert code == 1
    (found,) = read_reports(tmp_path)
    assert (found.rank, found.host) == (2, "node2")
    assert found.text == "the connection to host node2 is lost: ssh ended with exit code 255: broken\n"
