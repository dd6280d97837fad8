"""Differentiable collectives, with ranks as threads."""

import subprocess
import sys

import numpy as np
import pytest

import disttrain as dt
from disttrain.autodiff import Tensor, no_grad, ops
from disttrain.comm import functional, threads
from disttrain.errors import ConfigError
from tests.autodiff.test_plan import planned, step_of
from tests.comm import gradients

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("case", gradients.EVERYWHERE)
def test_gradients_are_those_of_the_sum_of_all_losses(world_size, case):
    make, shape = gradients.EVERYWHERE[case]
    order = 2 if world_size < 4 else 1
    threads.run(world_size, lambda comm: gradients.check(comm, make(comm), shape, order=order))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", gradients.EVERYWHERE)
def test_they_replay_in_a_plan(case, dtype):
    make, shape = gradients.EVERYWHERE[case]

    def work(comm):
        step = step_of(make(comm))
        first, second = (np.full(shape, scale + comm.rank, dtype) for scale in (0.5, 0.25))
        got = [array.copy() for array in planned(step, [first]).run([second])]
        return all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(got, step(second), strict=True))

    assert threads.run(3, work) == [True] * 3


def test_values_are_those_of_the_communicator():
    def work(comm):
        x = np.arange(6.0).reshape(3, 2) * (comm.rank + 1)
        for name in ("all_reduce", "all_gather", "reduce_scatter"):
            np.testing.assert_array_equal(getattr(functional, name)(x).data, getattr(comm, name)(x.copy()))
        np.testing.assert_array_equal(functional.all_reduce(x, "mean").data, comm.all_reduce(x.copy()) / 3)
        np.testing.assert_array_equal(functional.broadcast(x, 1).data, np.arange(6.0).reshape(3, 2) * 2)

    threads.run(3, work)


def test_a_rank_that_needs_no_gradient_takes_part_in_those_of_others():
    def work(comm):
        mine = Tensor(np.full(2, 3.0), requires_grad=comm.rank == 0)
        x = functional.broadcast(mine) if comm.rank == 0 else functional.broadcast(np.zeros(2))
        (functional.all_reduce(x * (comm.rank + 1.0)) ** 2).sum().backward()
        return mine.grad

    first, *others = threads.run(3, work)
    # each of 3 losses is 2 sums (1 + 2 + 3) ** 2 x ** 2, so its gradient is 3 * 2 * 36 * x
    np.testing.assert_allclose(first, np.full(2, 3 * 2 * 36 * 3.0), rtol=1e-15)
    assert others == [None, None]


def test_a_pipeline_of_two_stages_trains_as_one():
    generator = np.random.default_rng(7)
    x, first, second = (generator.standard_normal(shape) for shape in [(5, 4), (4, 3), (3, 2)])

    def stages(comm):
        if comm.rank == 0:
            weight = Tensor(first, requires_grad=True)
            functional.send(ops.tanh(Tensor(x) @ weight), 1).backward()
        else:
            weight = Tensor(second, requires_grad=True)
            (functional.recv(np.empty((5, 3)), 0) @ weight).sum().backward()
        return weight.grad

    whole = Tensor(first, requires_grad=True), Tensor(second, requires_grad=True)
    (ops.tanh(Tensor(x) @ whole[0]) @ whole[1]).sum().backward()
    for got, weight in zip(threads.run(2, stages), whole, strict=True):
        np.testing.assert_array_equal(got, weight.grad)


def test_nothing_goes_back_under_no_grad():
    def work(comm):
        with no_grad():
            token = functional.send(np.ones(3), 1) if comm.rank == 0 else functional.recv(np.ones(3), 0)
        return token.requires_grad

    assert threads.run(2, work) == [False, False]


def test_what_goes_back_is_not_mistaken_for_another_message_of_its_tag():
    def work(comm):
        if comm.rank == 1:
            received = functional.recv(np.ones(2), 0, tag=8191)
            comm.send(np.full(2, 5.0), 0, tag=8191)
            (received * 3.0).sum().backward()
            return None
        x = Tensor(np.ones(2), requires_grad=True)
        functional.send(x, 1, tag=8191).backward()
        return x.grad.tolist(), comm.recv(np.zeros(2), 1, tag=8191).tolist()

    assert threads.run(2, work)[0] == ([3, 3], [5, 5])


@pytest.mark.parametrize("call", [functional.all_reduce, functional.reduce_scatter])
def test_other_operations_have_no_gradient_everywhere(call):
    with pytest.raises(ConfigError, match="unknown op 'max'"):
        threads.run(1, lambda comm: call(np.ones(2), "max"))


@pytest.mark.parametrize("tag", [-1, 8192])
def test_tags_are_checked(tag):
    with pytest.raises(ConfigError, match="expected 0 to 8191"):
        threads.run(2, lambda comm: functional.recv(np.ones(2), 1 - comm.rank, tag=tag))


def test_it_is_part_of_the_facade_and_comm_alone_does_not_load_autodiff():
    assert dt.comm.functional is functional
    code = "import sys, disttrain.comm; print([name for name in sys.modules if 'autodiff' in name])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
