"""Joining a job: init, current, connect, use."""

import os
import threading

import numpy as np
import pytest
import threadpoolctl

from disttrain import comm as dt_comm
from disttrain import env
from disttrain.comm import threads
from disttrain.comm.local import LocalCommunicator
from disttrain.errors import ConfigError


@pytest.fixture(autouse=True)
def not_joined(monkeypatch):
    monkeypatch.setattr(dt_comm, "_joined", None)


def test_init_joins_once_in_all_threads():
    comm, seen = dt_comm.init(), []
    thread = threading.Thread(target=lambda: seen.append(dt_comm.current()))
    thread.start()
    thread.join()
    assert isinstance(comm, LocalCommunicator)
    assert (comm.rank, comm.world_size, comm.local_rank) == (0, 1, 0)
    assert seen == [comm]
    assert dt_comm.init() is dt_comm.init("local") is dt_comm.current() is comm


def test_current_joins():
    assert dt_comm.current() is dt_comm.init()


def test_another_transport_than_the_one_joined_is_refused():
    dt_comm.init("local")
    with pytest.raises(ConfigError, match=r"init\('mpi'\): this process has joined by 'local'"):
        dt_comm.init("mpi")


def test_the_environment_names_the_transport(monkeypatch):
    monkeypatch.setattr(env, "transport", lambda: "nowhere")
    with pytest.raises(ConfigError, match="unknown transport 'nowhere'"):
        dt_comm.init()


@pytest.mark.parametrize("name", ["locale", "base", "threads", "no.such.module", "disttrain.comm.ring"])
def test_an_unknown_transport_is_refused_with_those_that_exist(name):
    with pytest.raises(ConfigError, match=f"unknown transport '{name}'.* Known: local, mpi"):
        dt_comm.connect(name)


def test_a_module_of_the_users_own_is_a_transport(tmp_path, monkeypatch):
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "pigeons.py").write_text("from disttrain.comm.local import connect")
    monkeypatch.syspath_prepend(tmp_path)
    comm = dt_comm.init("my_package.pigeons")
    assert comm.transport == "my_package.pigeons"
    assert dt_comm.init("my_package.pigeons") is comm


def test_a_transport_that_lacks_a_module_says_which(tmp_path, monkeypatch):
    (tmp_path / "lame").mkdir()
    (tmp_path / "lame" / "duck.py").write_text("import wings_of_a_duck")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="wings_of_a_duck"):
        dt_comm.connect("lame.duck")


def test_use_makes_another_communicator_current_for_a_while():
    joined, alone = dt_comm.init("local"), dt_comm.connect("local")

    def fail_inside():
        with dt_comm.use(alone) as comm:
            assert comm is alone is dt_comm.current() is dt_comm.init()
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert dt_comm.current() is joined


def test_a_rank_in_a_thread_is_the_current_one_there():
    def mine(comm, *, extra):
        assert dt_comm.current() is dt_comm.init("threads") is comm
        with dt_comm.use(dt_comm.connect("local")):
            assert dt_comm.current().world_size == 1
        return comm.rank, comm.world_size, comm.local_rank, extra

    assert threads.run(3, mine, extra=5) == [(rank, 3, rank, 5) for rank in range(3)]
    assert dt_comm._joined is None


def blas_threads():
    np.ones((2, 2)) @ np.ones((2, 2))
    return {pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"}


@pytest.mark.parametrize(
    ("places", "limit"),
    [
        ([["here", [0, 1, 2, 3]]] * 2, 2),  # two ranks, four cores, nobody is bound
        ([["here", [0, 1, 2, 3]]] * 8, 1),
        ([["here", [0, 1, 2, 3]], ["here", [4, 5, 6, 7]]], None),  # each has cores of its own
        ([["here", [0, 1, 2, 3]], ["there", [0, 1, 2, 3]]], None),
    ],
)
@pytest.mark.parametrize("chosen", [False, True])
def test_blas_gets_this_ranks_part_of_the_cores(monkeypatch, places, limit, chosen):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(dt_comm.platform, "node", lambda: "here")
    monkeypatch.setattr(env, "has_blas_threads", lambda: chosen)
    monkeypatch.setattr(LocalCommunicator, "all_gather_json", lambda comm, value: places)
    before = blas_threads()
    with threadpoolctl.threadpool_limits():  # restores what the test has changed
        dt_comm.init("local")
        assert blas_threads() == (before if limit is None or chosen else {limit})


def test_the_threads_that_the_job_asks_for_are_those_of_blas(monkeypatch):
    if not blas_threads():
        pytest.skip("threadpoolctl does not know the BLAS of this NumPy")
    monkeypatch.setenv(env.THREADS, "1")
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        dt_comm._divide_cores(LocalCommunicator(rank=0, world_size=1, local_rank=0))
        assert blas_threads() == {1}


def test_a_number_of_blas_threads_is_seen_in_the_environment():
    assert not env.has_blas_threads({"OMP_NUM_THREADS": ""})
    assert env.has_blas_threads({"OMP_NUM_THREADS": "4"})
    assert env.has_blas_threads({"OPENBLAS_NUM_THREADS": "1"})
