"""What cannot be started is refused with its reason, before anything starts."""

import pytest

from disttrain.errors import LaunchError
from launch.mpirun import find_mpi


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["-n", "0", "script.py"], "0 is not in the range x>=1"),
        (["-n", "two", "script.py"], "'two' is not a valid integer"),
        (["missing.py"], "File 'missing.py' does not exist"),
        (["temporary"], "File 'temporary' is a directory"),
        ([], "Missing argument 'SCRIPT'"),
        (["--launcher", "mpirum", "script.py"], "unknown launcher 'mpirum'; did you mean 'mpirun'?"),
        (["--launcher", "cli", "script.py"], "unknown launcher 'cli' Known: local, mpirun, ray, slurm, ssh."),
        (["--launcher", "no.such", "script.py"], "launcher 'no.such' cannot be imported: No module named 'no'"),
        (["--launcher", "os.path", "script.py"], "launcher 'os.path' has no function commands(job)"),
    ],
)
def test_a_job_that_cannot_be_started_is_refused(program, arguments, reason):
    program.script("open('started', 'w')")
    done = program.run("run", *arguments)
    assert done.exit_code == 2
    assert reason in done.err
    assert "Traceback" not in done.err
    assert not (program.folder / "started").exists()


def test_without_an_mpi_the_ways_to_one_are_named():
    with pytest.raises(LaunchError) as caught:
        find_mpi(wheels=(), path="")
    for way in ("pip install 'disttrain[mpi]'", "apt install mpich", "--launcher local needs none"):
        assert way in str(caught.value)
