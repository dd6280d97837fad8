"""A job that has too few files, open or on its disk, is refused or ends at once, and says what it lacks."""

import subprocess
import sys

import pytest

JOIN = "import disttrain as dt\ncomm = dt.init()\ncomm.barrier()\n"
each_launcher = pytest.mark.parametrize("launcher", ["local", pytest.param("mpirun", id="MPI")])


def run(program, launcher, before):
    command = [sys.executable, "-P", "-c", "from launch.cli import main; main()", "run", "-n", "2"]
    command += ["--launcher", launcher, program.script(JOIN)]
    options = {"cwd": program.folder, "env": program.env, "capture_output": True, "text": True, "timeout": 30}
    return subprocess.run([*before, *command], check=False, **options)


def test_a_limit_of_open_files_refuses_the_job(program):
    done = run(program, "local", ["prlimit", "--nofile=14"])
    assert done.returncode == 2
    assert "Error: 2 workers need 3 pipes each" in done.stderr
    assert done.stderr.rstrip().endswith("Too many open files")


@each_launcher
@pytest.mark.parametrize("inodes", [6, 10], ids=["for no pipes", "for no records"])
def test_a_disk_without_inodes_ends_the_job(program, mpi, launcher, inodes):
    mount = 'mount -t tmpfs -o nr_inodes=$0 tmpfs "$TMPDIR" && exec "$@"'
    inside = ["unshare", "--mount", "sh", "-c", mount, str(inodes)]
    if subprocess.run([*inside, "true"], env=program.env, capture_output=True, check=False).returncode:
        pytest.skip("this user may not make a mount namespace")
    done = run(program, launcher, inside)
    assert done.returncode != 0
    said = "Error: 2 workers need 3 pipes each" if inodes == 6 else "OSError: [Errno 28] No space left on device: "
    assert said in done.stderr
