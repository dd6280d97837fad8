"""Computations in turns: sums over all of them, in the middle of each."""

import threading

import pytest

from disttrain.errors import ConfigError
from disttrain.training.turns import Turns

pytestmark = pytest.mark.timeout(20)


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.mark.parametrize("count", [1, 2, 5])
def test_each_goes_on_until_it_needs_a_sum(count):
    turns = Turns(sum)
    log = []

    def computation(number):
        assert turns.number == number
        log.append(("a", number))
        first = turns.sum(number + 1)
        assert turns.number == number
        log.append(("b", number))
        second = turns.sum(first * 10**number)
        log.append(("c", number))
        return first, second

    for _ in range(2):  # and again
        log.clear()
        results = turns.run([lambda n=n: computation(n) for n in range(count)])
        first = sum(range(count + 1))
        assert results == [(first, sum(first * 10**n for n in range(count)))] * count
        assert log == [(part, n) for part in "abc" for n in range(count)]


def test_without_a_sum_there_is_no_thread():
    turns = Turns(sum)
    names = turns.run([lambda: (turns.number, threading.current_thread())] * 3)
    assert names == [(n, threading.current_thread()) for n in range(3)]


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_a_failure_ends_all(failing, when):
    turns = Turns(sum)
    begun, done = [], []

    def computation(number):
        begun.append(number)
        for at in ("before", "between", "after"):
            if number == failing and when == at:
                raise ValueError(f"{number} {at}")
            if at != "after":
                turns.sum(1)
        done.append(number)

    with pytest.raises(ValueError, match=f"{failing} {when}"):
        turns.run([lambda n=n: computation(n) for n in range(3)])
    assert done == (list(range(failing)) if when == "after" else [])
    assert begun == list(range(failing + 1 if when == "before" else 3))


@pytest.mark.parametrize("counts", [(1, 0), (0, 1), (2, 1, 2), (1, 2, 1), (1, 1, 2), (2, 2, 1)])
def test_computations_that_ask_for_other_sums_are_told(counts):
    turns = Turns(sum)

    def computation(number):
        for _ in range(counts[number]):
            turns.sum(1)

    with pytest.raises(ConfigError, match="in one shard of it and not in another"):
        turns.run([lambda n=n: computation(n) for n in range(len(counts))])
