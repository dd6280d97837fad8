"""Processes that are killed while they save, and disks that are full or cannot be written to."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def run(*command, timeout_s):
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_s, check=False, cwd=ROOT, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(1900)
@pytest.mark.parametrize(
    "trials", [pytest.param(30, id="short"), pytest.param(1000, id="long", marks=pytest.mark.long)]
)
def test_a_kill_at_any_moment_loses_nothing(trials):
    code = f"import sys; sys.argv[1:] = ['{trials}', '1']; sys.path.insert(0, '{ROOT}'); import tests.chaos.killing"
    out = run(sys.executable, "-c", code, timeout_s=1800)
    assert out.startswith(f"{trials} kills: nothing lost, nothing mixed")
    print(out)


def test_a_disk_that_is_full_or_read_only_is_named_and_nothing_is_lost(tmp_path):
    mount = ["unshare", "--mount", "sh", "-c", f"mount -t tmpfs -o size=1m none {tmp_path}"]
    try:
        tried = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("not proven here: there is no unshare to mount a small disk with")
    if tried.returncode != 0:
        pytest.skip(f"not proven here: a small disk cannot be mounted: {tried.stderr.strip()}")
    mount[-1] += f' && exec {sys.executable} -c "import sys; sys.path.insert(0, {str(ROOT)!r}); ' + (
        f'sys.argv[1:] = [{str(tmp_path)!r}]; import tests.chaos.full"'
    )
    *full, read_only, end = run(*mount, timeout_s=60).splitlines()
    assert end == "all of it"
    for line in full:
        assert f"{tmp_path}/run: a checkpoint of 240000 bytes could not be written: No space left on device (" in line
        assert "bytes are free); those written before are untouched" in line
    assert f"{tmp_path}/run: a checkpoint of 240000 bytes could not be written: Read-only file system" in read_only
