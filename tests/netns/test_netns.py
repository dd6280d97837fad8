"""Jobs across hosts that are network namespaces: what every transport must do, and what travels between hosts."""

import contextlib
import json
import sys
from pathlib import Path

import psutil
import pytest

from launch.mpirun import find_mpi
from tests.netns.network import Network, NoNetworkError

pytestmark = pytest.mark.timeout(120)

HERE = Path(__file__).parent
# pytest-mpi takes a test that has "mpi" among its names for one of its own.
each_transport = pytest.mark.parametrize("transport", ["tcp", "mpi"], ids=["over tcp", "over mpi"])
CLAIMS = [sys.executable, "-m", "pytest", "-q", "--with-mpi", "--only-mpi", str(HERE.parent / "mpi" / "test_comm.py")]


@contextlib.contextmanager
def network(hosts, **limits):
    """Yield a network; skip the test where there can be none."""
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(Network(hosts, **limits))
        except NoNetworkError as error:
            pytest.skip(str(error))
        yield made


@pytest.fixture(scope="module")
def two_hosts():
    with network(2, rate="") as made:
        yield made


def run(network, transport, argv, ranks_per_host=1):
    """Return what rank 0 of a job that ends well writes."""
    if transport == "mpi":
        if find_mpi().flavour != "mpich":
            pytest.skip("the stand-in for ssh is for MPICH's mpiexec")
        done = [network.run_mpi(argv, ranks_per_host)]
    else:
        done = network.run_tcp(argv, ranks_per_host)
    assert [each.returncode for each in done] == [0] * len(done), "".join(each.stdout for each in done)
    return done[0].stdout


@each_transport
def test_what_every_transport_must_do_holds_across_hosts(two_hosts, transport):
    assert " passed" in run(two_hosts, transport, [*CLAIMS, "-k", "holds_among or stacks"])


@pytest.mark.long
@each_transport
@pytest.mark.parametrize("ranks_per_host", [1, 2])
def test_all_that_every_transport_must_do_holds_across_hosts(two_hosts, transport, ranks_per_host):
    assert " passed" in run(two_hosts, transport, [*CLAIMS, "-k", "not gib"], ranks_per_host)


@pytest.mark.parametrize("hosts", [2, 4, pytest.param(8, marks=pytest.mark.long)])
def test_a_sum_sends_no_more_than_its_algorithm_says(hosts):
    """Each host sends 2 (p-1)/p of the array; beside 1448 bytes of it go 66 of headers, and acknowledgements."""
    size = 4 << 20
    with network(hosts, rate="") as made:
        found = json.loads(run(made, "tcp", [sys.executable, str(HERE / "traffic.py"), str(size)]))
    payload = 2 * (hosts - 1) / hosts * size
    assert all(right for _, right, _ in found)
    assert all(payload <= sent <= 1.07 * payload + 20_000 for _, _, sent in found), (payload, found)


@pytest.mark.long
def test_the_benchmark_runs_across_hosts(two_hosts):
    out = run(two_hosts, "mpi", [sys.executable, "-m", "benchmarks.allreduce", "2", "", "65536", "4194304"])
    assert "MPI_Allreduce" in out


def test_nothing_is_left_of_a_network():
    def holders():
        return [each.pid for each in psutil.Process().children(recursive=True) if each.name() in ("sleep", "sh")]

    before = holders()
    with network(2) as made:
        folder = Path(made._folder.name)
        assert len(holders()) == len(before) + 3
    assert holders() == before
    assert not folder.exists()
