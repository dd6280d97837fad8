"""Nothing of a job whose ranks were killed stays in the machine's memory."""

import os
from pathlib import Path

import pytest

from launch import leftovers

KILLED = """
import os, re, signal
import disttrain as dt
comm = dt.init()
files = re.findall(r"/dev/shm/\\w+", open("/proc/self/maps").read())
with open(f"files.{comm.rank}", "w") as file:
    file.write("\\n".join(sorted({each for each in files if os.path.exists(each)})))
comm.barrier()
WHO os.kill(os.getpid(), signal.SIGKILL)
comm.barrier()
"""


@pytest.mark.parametrize("who", ["if True:", "if comm.rank == 1:"], ids=["all", "one"])
def test_an_mpi_leaves_no_memory_when_ranks_are_killed(program, mpi, who):
    done = program.run("run", "-n", "2", "--launcher", "mpirun", program.script(KILLED.replace("WHO", who)))
    assert done.exit_code != 0, done.err

    files = {name for rank in range(2) for name in (program.folder / f"files.{rank}").read_text().split()}
    if not files:
        pytest.skip("this MPI has no files in /dev/shm while its ranks run")
    assert [name for name in files if Path(name).exists()] == []


def test_what_was_there_what_is_mapped_and_what_is_not_an_mpis_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(leftovers, "_FOLDER", tmp_path)
    names = ["mpich_shm_before", "mpich_shm_mapped", "mpich_shm_left", "sm_segment.left", "else"]
    paths = {name: tmp_path / name for name in names}
    paths["mpich_shm_before"].touch()
    before = leftovers.shared()
    for path in paths.values():
        path.touch()
    monkeypatch.setattr(leftovers, "_mapped", lambda: f"7f00-7f01 rw-s 0 0:1 2 {paths['mpich_shm_mapped']}\n")
    leftovers.remove(before)
    assert sorted(os.listdir(tmp_path)) == ["else", "mpich_shm_before", "mpich_shm_mapped"]


def test_the_maps_of_this_process_are_among_those_looked_at():
    assert "[stack]" in leftovers._mapped()
