"""no_grad: as context, as decorator, one inside another, and in threads."""

import threading

import numpy as np
import pytest

import disttrain as dt
from disttrain import Tensor
from disttrain.errors import AutodiffError


def recorded():
    return (Tensor(np.ones(1), requires_grad=True) * 2).requires_grad


def test_nothing_is_recorded_inside_and_everything_after():
    with dt.no_grad():
        assert not recorded()
    assert recorded()


def test_blocks_nest_and_may_share_an_object():
    block = dt.no_grad()
    with block:
        with block:
            assert not recorded()
        assert not recorded()
        with dt.no_grad():
            assert not recorded()
    assert recorded()


def test_an_error_ends_the_block():
    with pytest.raises(ZeroDivisionError), dt.no_grad():
        raise ZeroDivisionError
    assert recorded()


def test_a_decorated_function_may_call_itself():
    @dt.no_grad()
    def descend(depth):
        below = descend(depth - 1) if depth else []
        return [*below, recorded()]

    assert descend(5) == [False] * 6
    assert recorded()


def test_a_decorated_function_keeps_its_name():
    @dt.no_grad()
    def evaluate():
        """Say what."""

    assert (evaluate.__name__, evaluate.__doc__) == ("evaluate", "Say what.")


def test_what_one_thread_does_not_record_another_does():
    inside, leave = threading.Barrier(2, timeout=10), threading.Barrier(2, timeout=10)
    seen = {}

    def silent():
        with dt.no_grad():
            inside.wait()
            seen["silent"] = recorded()
            leave.wait()
        seen["silent after"] = recorded()

    def loud():
        inside.wait()  # while the other is in its block
        seen["loud"] = recorded()
        leave.wait()

    threads = [threading.Thread(target=target) for target in (silent, loud)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert seen == {"silent": False, "silent after": True, "loud": True}


def test_threads_differentiate_at_the_same_time():
    results = {}

    def work(number):
        x = Tensor(np.full(4, float(number)), requires_grad=True)
        for _ in range(50):
            with dt.no_grad():
                assert not recorded()
            (x * x).sum().backward()
        results[number] = x.grad

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    for number in range(4):
        np.testing.assert_array_equal(results[number], np.full(4, 50 * 2.0 * number))


def test_a_gradient_asked_for_where_nothing_is_recorded_is_an_error_and_not_zero():
    with dt.no_grad(), pytest.raises(AutodiffError, match="no_grad"):
        dt.grad(lambda x: (x * x).sum())(np.ones(2))
