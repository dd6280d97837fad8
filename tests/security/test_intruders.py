"""A job over TCP is attacked at every port that it opens, while ranks join and train: it says so, and goes on."""

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

import disttrain as dt
from disttrain import env
from disttrain.comm import rendezvous
from disttrain.comm.rendezvous import Claim, Pass
from tests.comm.test_tcp import free_port
from tests.security.intruders import Intruder, SlowPeers
from tests.training import worlds

ROOT = Path(__file__).parents[2]
SECRET = "known to the ranks of this job alone"
RANKS = 3
# What the job's proofs are made for, and what intruders prove: other secrets, other jobs, earlier attempts at this one.
JOB = f"rendezvous of {RANKS}"
JOBS = [
    Pass(secret=b"guessed", job=JOB),
    Pass(secret=b"", job=JOB),
    Pass(secret=SECRET.encode(), job=f"rendezvous of {RANKS + 1}"),
    Pass(secret=SECRET.encode(), job="5eb63bbbe01eeed093cb22bb8f5acdc3d0c4e7d5a4d9f9b8e5c8f1a7b6d3e2c1"),
]
REFUSED = re.compile(r"refused (?:a connection from|(\d+) connections, the last from) 127\.0\.0\.1:\d+: ")
CLAIMS = [Claim(rank, peer, channel) for rank in range(RANKS) for peer in range(rank) for channel in range(2)]
TRAIN = """
import sys, psutil
import disttrain as dt
from tests.training import worlds
comm = dt.init()
sockets = len(psutil.Process().net_connections("tcp"))
model = worlds.dense_net()
x, y = worlds.blobs()
model.fit(x, y, epochs=2, verbose=0, reproducible=True)
print(sockets, comm.transport, dt.state_digest(model))
"""


class Rank:
    """A rank of the job, as a scheduler would start it."""

    def __init__(self, rank, address):
        clean = {name: text for name, text in os.environ.items() if not name.startswith(("DISTTRAIN_", "PMI", "SLURM"))}
        job = {env.TRANSPORT: "tcp", env.RENDEZVOUS: address, env.SECRET: SECRET, env.HOST: f"host {rank}"}
        place = {env.RANK: str(rank), env.WORLD_SIZE: str(RANKS)}
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, "-c", TRAIN]
        self.said = ()
        self.process = subprocess.Popen(command, env={**clean, **job, **place}, cwd=ROOT, **streams)

    def listens_at(self):
        """Return the addresses at which it listens now."""
        try:
            found = psutil.Process(self.process.pid).net_connections("tcp")
        except psutil.Error:
            return []
        return [tuple(each.laddr) for each in found if each.status == psutil.CONN_LISTEN]

    def end(self):
        """Wait for its end; return its exit code, and what it wrote."""
        if not self.said:
            self.said = self.process.communicate(timeout=120)
        return self.process.returncode, *self.said


def until(is_so):
    end_s = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < end_s
        time.sleep(0.01)


@pytest.fixture(scope="module")
def digest():
    model = worlds.dense_net()
    x, y = worlds.blobs()
    worlds.alone(lambda comm: model.fit(x, y, epochs=2, verbose=0, reproducible=True))
    return dt.state_digest(model)


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("sessions", "slow"),
    [pytest.param(300, 40, id="short"), pytest.param(10_000, 200, id="long", marks=pytest.mark.long)],
)
def test_whoever_attacks_the_job_joins_and_trains_undisturbed(digest, sessions, slow):
    """The last rank comes only when all sessions are over, so that the others listen all the while."""
    port, begin_s = free_port(), time.monotonic()
    intruders = [Intruder(seed, JOBS, CLAIMS) for seed in range(2)]
    ranks = [Rank(rank, f"127.0.0.1:{port}") for rank in range(RANKS - 1)]
    ports, failures, is_over = set(), [], threading.Event()

    def attack(intruder, address, count):
        try:
            until(lambda: address in ranks[0].listens_at() and ranks[1].listens_at())
            with SlowPeers(address, slow // len(intruders)) as peers:
                while sum(intruder.counts.values()) < count:
                    peers.go_on()
                    intruder.session(address)
                    assert not intruder.refused, "nobody listens any more, as if all had come"
                while not is_over.wait(0.05):  # ranks join and train
                    peers.go_on()
                    for found in {each for rank in ranks for each in rank.listens_at()}:
                        ports.add(found)
                        intruder.session(found)
                for found in {address, *ports}:  # nobody listens
                    intruder.session(found)
        except BaseException as error:
            failures.append(error)

    address = ("127.0.0.1", port)
    threads = [threading.Thread(target=attack, args=(each, address, sessions // 2)) for each in intruders]
    try:
        for thread in threads:
            thread.start()
        until(lambda: failures or all(sum(each.counts.values()) >= sessions // 2 for each in intruders))
        assert failures == []
        ranks.append(Rank(RANKS - 1, f"127.0.0.1:{port}"))
        ended = [rank.end() for rank in ranks]
    finally:
        is_over.set()
        for rank in ranks:
            rank.process.kill()
            rank.end()
        for thread in threads:
            thread.join()
    assert failures == []
    expected = f"{2 * (RANKS - 1)} tcp {digest}\n"  # two connections to each other rank, and none besides
    assert [(code, out) for code, out, _ in ended] == [(0, expected)] * RANKS, ended
    assert len(ports) >= RANKS  # ranks' own ports were attacked as well
    assert all(intruder.refused >= len(ports) for intruder in intruders)  # and is closed once all have come
    refused = [(number, REFUSED.search(line)) for number, (_, _, err) in enumerate(ended) for line in err.splitlines()]
    assert all(found for _, found in refused), ended  # and nothing else is said
    assert sum(int(found[1] or 1) for _, found in refused) >= sessions
    assert len(refused) <= 2 * (RANKS + 1) + (time.monotonic() - begin_s) / rendezvous._SAY_S  # two for each listener
    print({kind: sum(each.counts[kind] for each in intruders) for kind in intruders[0].counts}, refused[-1])
