"""Differentiable collectives among processes, and in groups of them."""

import pytest

from tests.comm import gradients

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("case", gradients.EVERYWHERE)
def test_gradients_are_those_of_the_sum_of_all_losses(comm, case):
    make, shape = gradients.EVERYWHERE[case]
    gradients.check(comm, make(comm), shape)


def test_gradients_in_a_group(comm):
    group = comm.split(comm.rank % 2)
    make, shape = gradients.EVERYWHERE["sum"]
    gradients.check(group, make(group), shape)
