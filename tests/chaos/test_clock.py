"""Clocks that jump change nothing: waits are by the monotonic clock, and the newest checkpoint by its number."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import disttrain as dt
from tests.training import worlds

pytestmark = pytest.mark.timeout(120)

ROOT = str(Path(__file__).parents[2])
TRAIN = f"""
import sys
sys.path.insert(0, {ROOT!r})
import disttrain as dt
from tests.training import worlds
model = worlds.dense_net()
x, y = worlds.blobs()
callbacks = [dt.callbacks.BackupAndRestore("run", save_freq=5)]
model.fit(x, y, batch_size=5, epochs=10, verbose=0, reproducible=True, callbacks=callbacks)
print(dt.state_digest(model))
"""
# Goes before the C library's: every seventh look at the wall clock finds that it has jumped.
JUMPS = r"""
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long jump(void) {
    static const long seconds[] = {0, 86400, -31536000, 946080000, -2, 3600, -900000000};
    static unsigned looks;
    return seconds[looks++ / 7 % 7];
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    long failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && clock == CLOCK_REALTIME) now->tv_sec += jump();
    return failed;
}
int gettimeofday(struct timeval *now, void *zone) {
    long failed = syscall(SYS_gettimeofday, now, zone);
    now->tv_sec += jump();
    return failed;
}
time_t time(time_t *now) {
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    if (now) *now = found.tv_sec;
    return found.tv_sec;
}
"""


@pytest.fixture(scope="module")
def digest():
    model = worlds.dense_net()
    x, y = worlds.blobs()
    worlds.alone(lambda comm: model.fit(x, y, batch_size=5, epochs=10, verbose=0, reproducible=True))
    return dt.state_digest(model)


def run(program, digest, before=(), **environ):
    """Train by two ranks, which save now and then; the command goes behind `before`. They end as an undisturbed one."""
    options = ["-n", "2", "--launcher", "local", "--transport", "tcp", "--hang-timeout", "2"]
    command = [
        sys.executable,
        "-P",
        "-c",
        "from launch.cli import main; main()",
        "run",
        *options,
        program.script(TRAIN),
    ]
    streams = {"cwd": program.folder, "env": {**program.env, **environ}, "capture_output": True, "text": True}
    done = subprocess.run([*before, *command], check=False, timeout=60, **streams)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"[{rank}] {digest}" for rank in range(2)]
    assert done.stderr == ""
    names = {path.name for path in (program.folder / "run").glob("checkpoint-*")}
    assert max(names) == "checkpoint-000008"  # of 40 steps, each fifth was saved


def test_a_wall_clock_that_jumps_changes_nothing(program, digest):
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    source, library = program.folder / "jumps.c", program.folder / "jumps.so"
    source.write_text(JUMPS)
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source)], check=True)
    look = [sys.executable, "-c", "import time; print(len({time.time() // 1e5 for _ in range(50)}))"]
    found = subprocess.run(
        look, env={**os.environ, "LD_PRELOAD": str(library)}, capture_output=True, text=True, check=True
    )
    assert int(found.stdout) > 3  # it does jump
    run(program, digest, LD_PRELOAD=str(library))


@pytest.mark.long
def test_a_machine_that_has_just_started_trains(program, digest):
    """Its monotonic clock is near 0, as none is on a machine where tests are written."""
    offset_s = 2 - int(time.clock_gettime(time.CLOCK_MONOTONIC))
    inside = ["unshare", "--time", "--fork", "--kill-child", "--monotonic", str(offset_s)]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*inside, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("this user, or kernel, makes no time namespace")
    run(program, digest, inside)
