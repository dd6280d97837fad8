"""What messages cost, and what follows from it."""

import os
import time

import numpy as np
import pytest

from disttrain import env
from disttrain.comm import costs, threads
from disttrain.comm.costs import Costs
from tests.comm import claims

pytestmark = pytest.mark.timeout(60)

ETHERNET = Costs(latency_s=50e-6, byte_s=8e-9)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(env, "costs_dir", lambda: tmp_path / "costs")
    return tmp_path / "costs"


def messages_of_ring(nbytes, ranks):
    """Return the rounds of a ring all-reduce, as the bytes that a rank sends in each."""
    return [nbytes / ranks] * (2 * (ranks - 1))


@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 9])
@pytest.mark.parametrize("nbytes", [0, 4096, 1 << 24])
def test_the_formulas_are_the_rounds_added_up(ranks, nbytes):
    rounds = messages_of_ring(nbytes, ranks)
    time_s = sum(ETHERNET.latency_s + each * ETHERNET.byte_s for each in rounds)
    time_s += sum(rounds[: ranks - 1]) * costs._COMBINE_S
    assert ETHERNET.of_ring(nbytes, ranks) == pytest.approx(time_s)
    steps = {2: 1, 3: 1, 4: 2, 8: 3, 9: 3}[ranks]
    messages = steps + (2 if ranks in (3, 9) else 0)
    expected = messages * (ETHERNET.latency_s + nbytes * ETHERNET.byte_s) + steps * nbytes * costs._COMBINE_S
    assert ETHERNET.of_doubling(nbytes, ranks) == pytest.approx(expected)


@pytest.mark.parametrize("ranks", [4, 5, 8, 16])
def test_what_is_short_doubles_and_what_is_long_goes_round(ranks):
    def doubles(nbytes):
        return ETHERNET.of_doubling(nbytes, ranks) < ETHERNET.of_ring(nbytes, ranks)

    choices = [doubles(1 << power) for power in range(28)]
    assert choices[0]
    assert not choices[-1]
    assert sorted(choices, reverse=True) == choices  # one size divides them


def on_two_hosts(function):
    def work(comm):
        comm.join_node("ab"[comm.rank % 2])
        return function(comm)

    return threads.run(4, work)


def test_costs_between_hosts_are_those_of_their_messages_and_the_same_on_all_ranks(monkeypatch):
    # a message that takes 2 ms and 100 ns a byte more than these threads need
    def slow(comm):
        receive = comm._irecv

        class Late:
            def __init__(self, request, nbytes):
                self.request, self.wait_s = request, 2e-3 + nbytes * 1e-7

            def test(self):
                self.wait()
                return True

            def wait(self):
                self.request.wait()
                time.sleep(self.wait_s)

        comm._irecv = lambda array, source, tag, **how: Late(receive(array, source, tag, **how), array.nbytes)
        return comm._measured()

    monkeypatch.setattr(costs, "cached", lambda *args: None)
    found = on_two_hosts(slow)
    assert len(set(found)) == 1
    assert found[0].latency_s >= 2e-3
    # that of a long message less that of a short one, which other threads may have held up
    assert found[0].byte_s * costs._LARGE_BYTES + found[0].latency_s >= 2e-3 + costs._LARGE_BYTES * 1e-7


def test_costs_are_measured_once_a_day_for_the_same_hosts(monkeypatch, folder):
    measured = []
    once = costs.measure
    monkeypatch.setattr(costs, "measure", lambda *args: measured.append(1) or once(*args))
    first = on_two_hosts(lambda comm: comm.costs)
    assert len(measured) == 2  # one rank of each host
    assert on_two_hosts(lambda comm: comm.costs) == first
    assert len(measured) == 2
    (file,) = folder.iterdir()
    old = time.time() - costs._AGE_S - 60
    os.utime(file, (old, old))
    on_two_hosts(lambda comm: comm.costs)
    assert len(measured) == 4


@pytest.mark.parametrize("text", ["", "{", "[]", '{"latency_s": 1}', '{"latency_s": 1, "byte_s": 2, "more": 3}'])
def test_a_file_that_is_not_one_of_ours_is_measured_again(folder, text):
    costs.keep(ETHERNET, folder, "threads", ["a", "b", "a"])
    (file,) = folder.iterdir()
    assert costs.cached(folder, "threads", ["b", "a"]) == ETHERNET
    assert costs.cached(folder, "tcp", ["b", "a"]) is None
    file.write_text(text)
    assert costs.cached(folder, "threads", ["b", "a"]) is None


def test_a_folder_that_cannot_be_written_to_keeps_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    costs.keep(ETHERNET, tmp_path / "file" / "costs", "threads", ["a", "b"])
    assert costs.cached(tmp_path / "file" / "costs", "threads", ["a", "b"]) is None


def test_within_a_host_nothing_is_measured(monkeypatch):
    def work(comm):
        comm.join_node("here")
        before = comm.bytes_sent
        comm.all_reduce(np.ones(10, np.int64))
        return comm.bytes_sent - before, comm.costs

    monkeypatch.setattr(costs, "measure", None)
    assert threads.run(2, work) == [(80, costs.WITHIN_HOST)] * 2


def test_a_first_sum_measures_and_is_right():
    def work(comm):
        pending = [comm.start_all_reduce(claims.values((size,), "int64", comm.rank)) for size in (5, 500)]
        for each in pending:
            each.wait()
        claims.all_reduce_is_exact(comm, 100_003, "float32", "sum")
        return comm.costs

    assert None not in on_two_hosts(work)
