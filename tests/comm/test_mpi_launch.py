"""Under mpiexec, and where MPI and its launcher fail: each test starts processes of its own."""

import os
import pathlib
import re
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.timeout(60)

MPIEXEC = pathlib.Path(sys.executable).with_name("mpiexec")
LAUNCHERS = ("PMI", "OMPI_", "PMIX_", "MPI_LOCAL", "SLURM_", "HYDRA_", "DISTTRAIN_", "PYTHONUNBUFFERED")

needs_mpiexec = pytest.mark.skipif(not MPIEXEC.exists(), reason=f"there is no {MPIEXEC}")


def start(command, **environ):
    clean = {name: text for name, text in os.environ.items() if not name.startswith(LAUNCHERS)}
    return subprocess.run(command, env=clean | environ, capture_output=True, text=True, timeout=30, check=False)


def python(code, **environ):
    return start([sys.executable, "-c", code], **environ)


def ranks(count, code):
    return start([str(MPIEXEC), "-n", str(count), sys.executable, "-W", "error", "-c", code])


JOIN = "from disttrain import comm; c = comm.init()\n"


@needs_mpiexec
def test_a_job_that_ends_well_says_nothing():
    done = ranks(2, JOIN + "c.barrier(); print(f'{c.transport} {c.rank} {c.world_size} {c.local_rank}')")
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == ["mpi 0 2 0", "mpi 1 2 1"]
    assert done.stderr == ""


@needs_mpiexec
@pytest.mark.parametrize(
    ("raising", "printed"),
    [("1 / 0", "ZeroDivisionError: division by zero"), ("raise KeyboardInterrupt", "KeyboardInterrupt")],
)
def test_an_exception_on_one_rank_ends_all_within_two_seconds(raising, printed):
    code = JOIN + (
        "import sys, time; c.barrier()\n"
        "if c.rank == 0: print('raised at', time.time()); sys.stdout.write('unflushed ')\n"
        f"if c.rank == 0: {raising}\n"
        "c.barrier()"
    )
    done = ranks(2, code)
    ended = time.time()
    raised = float(done.stdout.partition("raised at ")[2].split()[0])
    assert ended - raised < 2
    assert done.returncode != 0
    assert "unflushed" in done.stdout
    assert done.stderr.count("Traceback (most recent call last)") == 1
    assert printed in done.stderr


@needs_mpiexec
def test_an_excepthook_of_the_users_own_comes_first():
    code = (
        "import sys; sys.excepthook = lambda *error: print('mine', error[1])\n" + JOIN + "if c.rank == 1: 1 / 0\n"
        "c.barrier()"
    )
    done = ranks(2, code)
    assert done.returncode != 0
    assert "mine division by zero" in done.stdout


def test_a_process_that_is_alone_under_a_launcher_of_two_refuses():
    done = python(
        "from disttrain import comm; comm.init()",
        OMPI_COMM_WORLD_SIZE="2",
        OMPI_COMM_WORLD_RANK="1",
        DISTTRAIN_TRANSPORT="mpi",
    )
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert last.startswith("disttrain.errors.LaunchError: Open MPI's mpirun (OMPI_COMM_WORLD_SIZE=2)")
    assert "MPICH Version: " in last
    assert str(MPIEXEC) in last
    assert "RuntimeWarning" not in done.stderr


def test_an_mpi_that_cannot_be_loaded_names_both_ways_to_get_one():
    done = python("from disttrain import comm; comm.init('mpi')", MPI4PY_LIBMPI="/nowhere/libmpi.so")
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert last.startswith("disttrain.errors.LaunchError: MPI cannot be loaded")
    assert "/nowhere/libmpi.so" in last
    assert "pip install 'disttrain[mpi]'" in last
    assert "the system's own" in last


def test_importing_comm_loads_neither_mpi4py_nor_threadpoolctl():
    code = "import sys, disttrain.comm, disttrain.comm.mpi; print({'mpi4py', 'threadpoolctl'} & {*sys.modules})"
    assert python(code).stdout == "set()\n"


@needs_mpiexec
@pytest.mark.parametrize("ending", ["sys.exit()", "sys.exit(3)", "c.world_size"])
@pytest.mark.parametrize("call", ["c.barrier()", "c.recv(c.all_gather_json(0) and numpy.ones(3), 1)"])
def test_a_rank_that_leaves_while_another_waits_for_it_is_named(ending, call):
    code = JOIN + f"import numpy, sys\nif c.rank == 1: {ending}\nelse: {call}"
    done = ranks(2, code)
    assert done.returncode != 0
    assert "CommError: rank 1 has left the job, its script has ended or called sys.exit(), and rank 0" in done.stderr


@needs_mpiexec
@pytest.mark.parametrize("dtype", ["float32", "int64"])  # in memory that they share, and by messages
def test_a_rank_that_leaves_is_named_while_sums_of_another_group_are_under_way(dtype):
    code = JOIN + (
        "import numpy, sys; one, other = c.split(0), c.split(0)\n"
        f"if c.rank == 1: sys.exit()\nsummed = numpy.ones(100, '{dtype}')\n"
        "pending = one.start_all_reduce(summed); other.all_reduce(summed.copy())"
    )
    done = ranks(2, code)
    assert done.returncode != 0
    assert "CommError: rank 1 has left the job, its script has ended or called sys.exit(), and rank 0" in done.stderr
    assert re.search(r"in group \d, of the job's ranks 0, 1", done.stderr)


@needs_mpiexec
def test_ranks_may_leave_when_they_like_and_what_they_sent_still_arrives():
    code = JOIN + (
        "import numpy, time\n"
        "if c.rank == 1: c.send(numpy.ones(3), 0)\n"
        "else: time.sleep(2); print(c.recv(numpy.zeros(3), 1).sum())"
    )
    done = ranks(2, code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "3.0\n", "")


@needs_mpiexec
def test_a_rank_that_has_waited_long_says_for_whom_and_where():
    code = JOIN + (
        "import time; from disttrain.comm import waiting; waiting.PATIENCE_S = 0.5\n"
        "if c.rank == 1: time.sleep(2)\n"
        "c.barrier()"
    )
    done = ranks(2, code)
    assert done.returncode == 0
    first, *_ = done.stderr.splitlines()
    assert re.match(r"rank 0 has waited \d s for rank 1 in barrier \d+ \(float32, 0 bytes\), ", first)
    assert "called at <string>:4; that rank is busy, stopped, or makes another call" in first


@needs_mpiexec
@pytest.mark.parametrize("hosts", ["aabb", "aab"])
def test_ranks_of_simulated_hosts_sum_as_ranks_of_one(hosts, tmp_path):
    # all of them on this machine: each rank says which host it takes itself to be on
    code = (
        f"import os, pathlib; from disttrain import env; env.costs_dir = lambda: pathlib.Path({str(tmp_path)!r})\n"
        f"os.environ[env.HOST] = {hosts!r}[env.place().rank]\n" + JOIN + "from tests.comm import claims\n"
        "for size in claims.SIZES:\n"
        "    for dtype in claims.DTYPES:\n"
        "        for op in claims.OPS: claims.all_reduce_is_exact(c, size, dtype, op)\n"
        "claims.all_reduce_gives_the_same_bits(c); claims.pendings_interleave(c, 1); claims.pendings_need_no_wait(c)\n"
        "claims.json_of_every_length(c); claims.broadcast_from_every_root(c); claims.messages_pass_around(c)\n"
        "claims.a_pending_sum_moves_while_a_message_is_awaited(c); claims.all_reduce_of_views(c)\n"
        "window, before = c.allocate(100_000), c.bytes_sent\n"
        "with claims.messages_cost(c, claims.LONG): c.all_reduce(window)\n"
        "sent = c.all_gather_json(c.bytes_sent - before)\n"
        "if c.rank == 0: print(c._nodes, sent)"
    )
    done = ranks(len(hosts), code)
    assert (done.returncode, done.stderr) == (0, "")
    nodes, first = ("[[0, 1], [2, 3]]", "[400000, 0, 400000, 0]") if hosts == "aabb" else ("[[0, 1], [2]]", None)
    assert done.stdout == f"{nodes} {first or '[400000, 0, 400000]'}\n"
