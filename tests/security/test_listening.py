"""What a job listens at, as the system tells it: loopback, while ranks join; nothing before and after that."""

import json
import time
from pathlib import Path

import psutil
import pytest

from tests.launch.conftest import LIMIT_S

pytestmark = pytest.mark.timeout(120)

SCRIPT = str(Path(__file__).with_name("listening.py"))


def sockets(started):
    """Return the addresses and names at which processes of the job listen, or receive datagrams."""
    found = set()
    for process in [started, *started.children(recursive=True)]:
        try:
            for each in process.net_connections("all"):
                name = each.laddr if isinstance(each.laddr, str) else each.laddr.ip
                found |= {name} if name and not each.raddr else set()
        except psutil.Error:  # it has ended meanwhile
            continue
    return found


def run(program, *options, joins=True):
    """Run two ranks; return `sockets` before they join, while they do, and afterwards; and what they have bound.

    The latter is of each rank's Python code, and tells as much where an MPI has sockets.
    """
    process = program.start("run", "-n", "2", *options, SCRIPT)
    started, found = psutil.Process(process.pid), []

    def until(*names):
        end_s = time.monotonic() + LIMIT_S
        while not all(list(program.folder.glob(name)) for name in names):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end_s
            time.sleep(0.01)

    until("begun.0", "begun.1")
    found.append(sockets(started))
    (program.folder / "join").touch()
    if joins:
        until("dialing")
        found.append(sockets(started))
    (program.folder / "dial").touch()
    until("joined.0", "joined.1")
    found.append(sockets(started))
    (program.folder / "end").touch()
    done = program.finish(process)
    assert done.exit_code == 0, done.err
    own = dict(json.loads(line.partition(" ")[2]) for line in done.out.splitlines())
    return found, [{address for address, _ in own[rank]} for rank in range(2)]


@pytest.mark.long
def test_ranks_in_shared_memory_listen_at_nothing(program):
    assert run(program, "--launcher", "local", joins=False) == ([set()] * 2, [set()] * 2)


@pytest.mark.parametrize("launcher", ["local", pytest.param("tests.launch.hosts", marks=pytest.mark.long)])
def test_ranks_over_tcp_listen_at_loopback_until_all_have_come(program, launcher):
    found, own = run(program, "--launcher", launcher, "--transport", "tcp")
    assert found == [set(), {"127.0.0.1"}, set()]
    assert own == [{"127.0.0.1"}] * 2


@pytest.mark.long
def test_beside_what_an_mpi_opens_ranks_listen_at_nothing(program, mpi):
    _, own = run(program, "--launcher", "mpirun", joins=False)
    assert own == [set()] * 2


@pytest.mark.long
def test_who_hears_of_ranks_on_other_hosts_listens_at_one_address_until_all_have_come(program):
    found, _ = run(program, "--launcher", "tests.launch.away")
    assert found[0] <= {"127.0.0.1"}
    assert found[1:] == [{"127.0.0.1"}, set()]
