"""A network that fails while ranks train over it: for seconds, unnoticed; for longer, each side names the other."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import disttrain as dt
from disttrain.comm import tcp
from tests.netns.test_netns import network
from tests.training import worlds

pytestmark = pytest.mark.timeout(120)

ROOT = Path(__file__).parents[2]
SWITCH = 2  # behind two hosts
# What is done to the network and how it is undone: where, and the command.
CUTS = {
    "a link that is down": ([(SWITCH, "ip link set port1 down")], [(SWITCH, "ip link set port1 up")]),
    "an interface that is down": ([(1, "ip link set eth0 down")], [(1, "ip link set eth0 up")]),
    "packets that are lost": (
        [(SWITCH, f"tc qdisc add dev port{host} root blackhole") for host in range(2)],
        [(SWITCH, f"tc qdisc del dev port{host} root") for host in range(2)],
    ),
    "packets that are lost one way": (
        [(SWITCH, "tc qdisc add dev port0 root blackhole")],
        [(SWITCH, "tc qdisc del dev port0 root")],
    ),
    "a host without a way to the other": (
        [(1, "ip route add blackhole 10.77.0.1/32")],
        [(1, "ip route del blackhole 10.77.0.1/32")],
    ),
}
each_cut = pytest.mark.parametrize(
    "cut",
    [pytest.param(name, marks=() if name == "packets that are lost" else pytest.mark.long) for name in CUTS],
)


@pytest.fixture(scope="module")
def digest():
    model = worlds.dense_net()
    x, y = worlds.blobs()
    worlds.alone(lambda comm: model.fit(x, y, batch_size=5, epochs=10, verbose=0, reproducible=True))
    return dt.state_digest(model)


@pytest.fixture
def hosts():
    with network(2, rate="") as made:
        yield made


@contextlib.contextmanager
def training(hosts, folder, silence_s=tcp._SILENCE_S):
    """Start ranks that train, one on each host; yield, when they stand still at a step, what lets them go on.

    It takes commands, as in `CUTS`, that are to be done before, and returns the future of the ranks' ends.
    """
    command = ["env", f"--chdir={folder}", sys.executable, str(Path(__file__).with_name("losing.py")), str(silence_s)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with ThreadPoolExecutor(1) as pool:
        ends = pool.submit(hosts.run_tcp, command, PYTHONPATH=path)

        def go_on(commands):
            play(hosts, commands)
            written = folder / "go.tmp"
            written.write_text(str(time.monotonic()))
            written.rename(folder / "go")
            return ends

        try:
            while not all((folder / f"ports.{rank}").exists() for rank in range(len(hosts.addresses))):
                assert not ends.done(), ends.result()
                time.sleep(0.01)
            yield go_on
        finally:
            (folder / "go").touch()


def play(hosts, commands):
    for host, command in commands:
        hosts._inside(host, command)


def outcomes(ends):
    """Return what each rank has written last, and how long after the cut it ended, None where it has trained."""
    found = []
    for end in ends.result():
        *_, last = end.stdout.splitlines()
        failed = re.match(r"(\d+\.\d) (.*)", last)
        assert end.returncode == (1 if failed else 0), end.stdout
        found.append((failed[2], float(failed[1])) if failed else (last, None))
    return found


@pytest.mark.long
@each_cut
@pytest.mark.parametrize("cut_s", [1, 2, 4])
def test_a_network_that_is_back_within_seconds_changes_nothing(hosts, tmp_path, digest, cut, cut_s):
    begin, end = CUTS[cut]
    with training(hosts, tmp_path) as go_on:
        ends = go_on(begin)
        time.sleep(cut_s)
        assert not ends.done()
        play(hosts, end)
    assert outcomes(ends) == [(digest, None)] * 2


@each_cut
@pytest.mark.parametrize("silence_s", [2, pytest.param(10, marks=pytest.mark.long)])
def test_each_side_names_the_other_when_the_network_stays_away(hosts, tmp_path, cut, silence_s):
    """Nobody goes on alone, so there are never two groups."""
    with training(hosts, tmp_path, silence_s) as go_on:
        ends = go_on(CUTS[cut][0])
    for rank, (text, after_s) in enumerate(outcomes(ends)):
        silent = (
            f"the host of rank {1 - rank} has not answered for {silence_s} s, and rank {rank} cannot go on without "
        )
        between = f"the network is down between {hosts.addresses[rank]} and {hosts.addresses[1 - rank]}"
        # who still hears the other one may hear of its end first
        ended = f"rank {1 - rank} has ended without a word" if "way" in cut else silent
        assert (silent in text and between in text) or ended in text, text
        assert silence_s - tcp._ASK_S <= after_s < silence_s + 10, text  # it may have been silent before the cut
        print(cut, rank, after_s, text)


@pytest.mark.long
def test_a_host_that_is_lost_ends_all_ranks(tmp_path):
    """Of three, two still reach each other: they do not go on as a group of their own."""
    with network(3, rate="") as hosts, training(hosts, tmp_path, 2) as go_on:
        ends = go_on([(3, "ip link set port2 down")])
        found = outcomes(ends)
    assert all(after_s is not None for _, after_s in found), found
    assert "the host of rank" in found[2][0], found
    assert any("the host of rank 2 has not answered" in text for text, _ in found[:2]), found


@pytest.mark.long
def test_a_rank_that_is_stopped_answers_by_its_system(hosts, tmp_path, digest):
    with training(hosts, tmp_path, 2) as go_on:
        _, pid = (tmp_path / "ports.1").read_text().split()
        ends = go_on([(1, f"kill -STOP {pid}")])
        time.sleep(6)
        assert not ends.done()
        os.kill(int(pid), signal.SIGCONT)
    assert outcomes(ends) == [(digest, None)] * 2


@pytest.mark.long
@pytest.mark.parametrize("what", ["messages", "all"])
def test_connections_that_something_resets_end_the_job_by_name(hosts, tmp_path, what):
    with training(hosts, tmp_path) as go_on:
        if subprocess.run(hosts.command(0, ["ss", "-K", "dport = 1"]), capture_output=True, check=False).returncode:
            pytest.skip("ss -K, or the kernel's INET_DIAG_DESTROY, is not here")
        port, _ = (tmp_path / "ports.1").read_text().split()
        ends = go_on([(1, f"ss -K sport = {port}" if what == "messages" else f"ss -K dst {hosts.addresses[0]}")])
    texts = [text for text, _ in outcomes(ends)]
    cut = [text.startswith(f"something has cut a connection to rank {1 - rank}, ") for rank, text in enumerate(texts)]
    # who hears of it later hears that the other one has ended
    assert any(cut), texts
    for rank, text in enumerate(texts):
        assert cut[rank] or text.startswith(f"rank {1 - rank} has ended without a word, killed or after an error"), (
            texts
        )
