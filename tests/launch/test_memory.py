"""What the kernel tells of memory that was lacking, in either version of cgroups, and without any."""

import subprocess
import sys

import pytest

from launch import diagnosis, memory


@pytest.fixture
def cgroup(tmp_path, monkeypatch):
    """Return a folder that takes the place of this process's cgroup."""
    files = [tmp_path / "memory.events"]
    monkeypatch.setattr(memory, "_files", lambda: files)
    return tmp_path


@pytest.mark.parametrize(
    "text", ["low 0\nmax 9\noom 7\noom_kill 3\noom_group_kill 1\n", "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"]
)
def test_kills_are_counted_in_the_cgroup(cgroup, text):
    (cgroup / "memory.events").write_text(text)
    assert memory.kills() == 3


def test_the_limit_is_told_where_there_is_one(cgroup):
    (cgroup / "memory.events").write_text("oom_kill 2\n")
    assert diagnosis.memory_in_words(2) == ""
    words = "the kernel has ended a process for lack of memory during this job"
    (cgroup / "memory.max").write_text("max\n")
    assert diagnosis.memory_in_words(1) == words
    (cgroup / "memory.max").write_text(f"{256 * 2**20}\n")
    assert diagnosis.memory_in_words(1) == f"{words}; the cgroup may use 256 MiB"


def test_without_a_cgroup_the_host_is_asked(cgroup):
    assert memory.kills() >= 0
    assert memory.limit_bytes() is None


def test_this_machine_can_be_asked():
    text = "from launch import memory; print(memory.kills(), memory.limit_bytes())"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split()[0].isdigit()
