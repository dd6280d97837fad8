"""Another user of the node can neither read a job, nor write to it, nor stop it, nor plant what it would use."""

import contextlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from disttrain import env
from disttrain.checkpoint.storage import storage
from disttrain.errors import CheckpointError
from disttrain.kernels import build
from disttrain.kernels.instruction_sets import choose, cpu_flags
from tests.checkpoint import shelf
from tests.launch.conftest import LIMIT_S

pytestmark = pytest.mark.timeout(120)

NOBODY = 65534
SECRET = "known to the ranks of this job alone"
TRANSPORTS = [("tcp", ()), ("shm", pytest.mark.long), ("mpi", pytest.mark.long)]
SCRIPT = """
import os, time
import disttrain as dt
comm = dt.init()
comm.allocate(1000)
open(f"ready.{comm.rank}", "w").close()
while not os.path.exists("end"):
    time.sleep(0.01)
comm.barrier()
"""
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
def public():
    """Yield a folder of all users, as /tmp is: those of pytest let nobody else in."""
    folder = Path(tempfile.mkdtemp(prefix="public-", dir="/tmp"))
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


def until(is_so):
    end_s = time.monotonic() + LIMIT_S
    while not is_so():
        assert time.monotonic() < end_s
        time.sleep(0.01)


@needs_root
@pytest.mark.parametrize(
    "transport", [pytest.param(each, id=f"over {each}", marks=marks) for each, marks in TRANSPORTS]
)
def test_another_user_reaches_nothing_of_a_job(program, mpi, public, transport):
    program.env |= {"TMPDIR": str(public), env.SECRET: SECRET}
    options = ["--launcher", "mpirun"] if transport == "mpi" else ["--launcher", "local", "--transport", transport]
    started = program.start("run", "-n", "2", *options, "--max-restarts", "1", program.script(SCRIPT))
    until(lambda: all((program.folder / f"ready.{rank}").exists() for rank in range(2)))
    processes = [psutil.Process(started.pid), *psutil.Process(started.pid).children(recursive=True)]
    (folder,) = public.glob("disttrain-*")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    said = " ".join(text for each in processes for text in each.cmdline())  # which all users see
    assert not re.search(f"{SECRET}|disttrain-[0-9a-f]{{32}}", said)
    done_by = {}
    for uid in (NOBODY, 0):
        command = [sys.executable, str(Path(__file__).with_name("neighbour.py")), str(uid), str(public)]
        command += [str(each.pid) for each in processes]
        attacker = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert attacker.returncode == 0, attacker.stderr
        done_by[uid] = {attack for attack, outcome in json.loads(attacker.stdout).items() if outcome == "done"}
    (program.folder / "end").touch()
    done = program.finish(started)
    assert done.exit_code == 0, done.err
    assert done_by[NOBODY] == {"see the folder's name"}
    assert len(done_by[0]) >= 20, done_by[0]  # for one who may, they work


# --- what was planted before a job begins ---


@pytest.mark.parametrize("name", [".lock", ".run.lock", ".run.json", ".tmp-owner"])
def test_a_link_planted_in_a_directory_of_checkpoints_leads_nowhere(tmp_path, name):
    other, place = tmp_path / "of another", tmp_path / "run"
    other.write_text("whole")
    place.mkdir()
    (place / name).symlink_to(other)
    for write in (lambda: shelf.save(place, 1), lambda: storage(place).claim().release()):
        with contextlib.suppress(CheckpointError):  # refused by name, or written elsewhere
            write()
    assert other.read_text() == "whole"


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """Return a cache of kernels, and the instruction set and name of a library that is not in it."""
    monkeypatch.setattr(build, "INSTALLED", tmp_path / "nothing")
    monkeypatch.setenv("CXX", "true")  # no compiler is needed to tell what its library is called
    portable = choose("portable", cpu_flags())
    flags = sorted(cpu_flags() & build.RELEVANT_FLAGS)
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    return cache, portable, f"{build._name(portable)}-{build._key(['true', build._version(['true']), *flags])}"


def test_a_library_in_the_cache_of_kernels_is_found(kernels):
    # so that the tests below fail for their own reasons
    cache, portable, name = kernels
    (cache / f"{name}.so").touch()
    assert build.build(portable, cache) == cache / f"{name}.so"


def test_a_link_planted_in_place_of_the_lock_of_kernels_leads_nowhere(kernels, tmp_path):
    cache, portable, name = kernels
    other = tmp_path / "of another"
    other.write_text("whole")
    (cache / f"{name}.lock").symlink_to(other)
    with pytest.raises(build.BuildError, match="cannot be used"):
        build.build(portable, cache)
    assert other.read_text() == "whole"


@pytest.mark.parametrize(("mode", "owner"), [(0o777, -1), (0o720, -1), pytest.param(0o700, NOBODY, marks=needs_root)])
def test_a_library_planted_in_the_cache_of_kernels_is_not_loaded(kernels, mode, owner):
    """Its name follows from the sources and the compiler: anybody can tell it before."""
    cache, portable, name = kernels
    (cache / f"{name}.so").touch()
    cache.chmod(mode)
    os.chown(cache, owner, -1)
    with pytest.raises(build.BuildError, match="others can write to the cache"):
        build.build(portable, cache)
