"""The shares of a step's time, by a clock that the test moves."""

import numpy as np
import pytest

from benchmarks import shares
from disttrain.comm import connect


class Ranks:
    """Rank 0 of 2, of which the other comes to each call `late_s` later, and goes on when this one does."""

    def __init__(self, now, late_s):
        self.now, self.late_s = now, late_s

    def spend(self, seconds):
        self.now[0] += seconds

    def all_reduce(self, array):
        self.spend(3.0)
        return array

    def all_gather_json(self, value):
        self.all_reduce(value)  # a call within a call counts once
        return [value]

    broadcast = broadcast_json = reduce_scatter = barrier = all_reduce

    def all_gather(self, array):
        other = array.copy()
        if array.ndim == 3:
            other[..., :2] = np.minimum(other[..., :2] + self.late_s, other[..., 2:])
        return np.stack([array, other])

    def start_all_reduce(self, array):
        self.spend(0.5)
        return self

    def advance(self):
        self.spend(0.25)
        return False

    def wait(self):
        self.spend(1.0)


@pytest.fixture
def now(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(shares.time, "perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize("call", ["all_reduce", "all_gather_json"])
def test_a_rank_that_is_early_waits(now, call):
    ranks = Ranks(now, late_s=2.0)

    def step():
        ranks.spend(1.0)
        getattr(ranks, call)(0)
        ranks.spend(1.0)

    # 5 s: this rank computes 2, waits 2, communicates 1; the other computes 4 and communicates 1
    expected = {"communication": 0.2, "waiting": 0.2, "data": 0.0, "compute": 0.6}
    assert shares.Shares(ranks).of(step, 3) == pytest.approx(expected)


def test_a_step_now_and_then_makes_one_more_call(now):
    ranks = Ranks(now, late_s=0.0)
    calls = iter([1, 2, 1])

    def step():
        ranks.spend(3.0)
        for _ in range(next(calls)):
            ranks.all_reduce(0)

    # medians over steps of 3 s of computing and 3, 6, 3 s of communication
    expected = {"communication": 0.5, "waiting": 0.0, "data": 0.0, "compute": 0.5}
    assert shares.Shares(ranks).of(step, 3) == pytest.approx(expected)


def test_what_is_under_way_costs_where_it_is_moved_and_where_it_is_waited_for(now):
    ranks = Ranks(now, late_s=0.0)

    def step():
        pending = ranks.start_all_reduce(0)
        ranks.spend(2.0)
        pending.advance()
        ranks.spend(0.25)
        pending.wait()

    # 4 s: 0.5 + 0.25 + 1 of communication, 2.25 of computing, and nobody is late
    expected = {"communication": 1.75 / 4, "waiting": 0.0, "data": 0.0, "compute": 2.25 / 4}
    assert shares.Shares(ranks).of(step, 2) == pytest.approx(expected)


def test_afterwards_the_communicator_is_as_it_was():
    comm = connect("local")
    before = dict(vars(comm))
    assert shares.Shares(comm).of(lambda: comm.all_reduce(np.ones(3)), 2)["waiting"] == 0
    assert vars(comm).keys() == before.keys()
