"""Ranks that make different collectives, among processes: each cell on a communicator of its own."""

import numpy as np
import pytest

from disttrain import comm as dt_comm
from disttrain.comm.mpi import MpiCommunicator
from disttrain.errors import CommError
from tests.comm import calls

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(60)]


def another(comm, *, is_on_node):
    """Return a communicator of the same ranks."""
    if comm.transport == "mpi":
        mpi = comm.mpi
        fresh = MpiCommunicator(mpi, mpi.COMM_WORLD.Dup(), mpi.COMM_WORLD.Dup())
        fresh.join_node("here")
    else:
        fresh = dt_comm.connect(comm.transport)
    if not is_on_node:
        fresh._node, fresh._nodes = None, [[rank] for rank in range(comm.world_size)]
    comm.barrier()  # who still joins would hear of the difference there
    return fresh


@pytest.mark.parametrize("is_on_node", [True, False], ids=["node", "messages"])
@pytest.mark.parametrize("name", calls.CELLS)
def test_every_difference_is_told_on_all_ranks(comm, name, is_on_node):
    if comm.world_size == 1:
        pytest.skip("a rank that is alone differs from none")
    odd = len(name) % comm.world_size
    result = calls.differ(another(comm, is_on_node=is_on_node), name, odd)
    calls.holds([(said, time_s) for said, time_s in comm.all_gather_json(result)], name, odd)


@pytest.mark.parametrize("waits", ["a message", "a sum in its own group", "a sum of all"])
def test_a_rank_that_waits_for_something_else_hears_it_too(comm, waits):
    if comm.world_size < 3:
        pytest.skip("needs a third rank")
    fresh = another(comm, is_on_node=True)
    last = comm.world_size - 1
    waiting = {
        "a message": lambda: fresh.recv(np.zeros(3), 0),
        "a sum in its own group": lambda: fresh.barrier(),
        "a sum of all": lambda: fresh.all_reduce(np.zeros(10**6)),
    }
    group = fresh.split("odd" if comm.rank == last else "others")
    said = None
    try:
        if comm.rank == last:
            waiting[waits]()
        else:
            group.all_reduce(np.zeros(5 + comm.rank))
    except CommError as error:
        said = str(error)
    told = comm.all_gather_json(said)
    assert told == [told[0]] * comm.world_size
    assert "in the group of rank 0, the shape differs: rank 0: " in told[0]
