"""What `--launcher ray` decides before there is any Ray: no test here needs one, and tests/ray has the others."""

import os
import socket
import sys
from pathlib import Path

import pytest

import disttrain as dt
from disttrain.errors import ConfigError, LaunchError
from disttrain.ray.actor import Rank
from launch import mpirun, ray
from launch.job import Job, commands

HOST = socket.gethostname()


def test_a_rank_says_what_it_does_not_find_on_its_node(tmp_path):
    rank = Rank(1)
    with pytest.raises(LaunchError, match=f"rank 1 cannot go to the script's folder {tmp_path}/no, on host {HOST}"):
        rank.arrive(f"{tmp_path}/no", "")
    here = Path.cwd()
    try:
        with pytest.raises(
            LaunchError, match=f"rank 1 does not find the script train.py in {tmp_path}, on host {HOST}"
        ):
            rank.arrive(str(tmp_path), "train.py")
    finally:
        os.chdir(here)


def test_without_an_mpi_several_workers_are_started_by_ray(monkeypatch, capsys):
    def find_mpi():
        raise LaunchError("there is no mpiexec")

    monkeypatch.setattr(mpirun, "find_mpi", find_mpi)
    monkeypatch.setattr(ray, "is_installed", lambda: True)
    (line,) = commands(Job(workers=4, script="train.py"))
    assert line.argv[1:4] == ("-P", "-m", "launch.actors")
    words = "disttrain: there is no MPI here, so Ray starts the workers; --launcher local does without\n"
    assert capsys.readouterr().err == words
    monkeypatch.setattr(ray, "is_installed", lambda: False)
    with pytest.raises(LaunchError, match="there is no mpiexec"):
        commands(Job(workers=4, script="train.py"))
    with pytest.raises(LaunchError, match=r"pip install 'disttrain\[ray\]'"):
        commands(Job(workers=4, script="train.py", launcher="ray"))


def test_a_function_cannot_be_trained_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    with pytest.raises(LaunchError, match=r"this needs Ray: pip install 'disttrain\[ray\]'"):
        dt.ray.train(print, workers=2)


def test_options_of_ray_are_refused_by_other_launchers():
    with pytest.raises(ConfigError, match="unknown option of --launcher local: 'address'"):
        commands(Job(workers=2, script="s.py", launcher="local", options={"address": "auto"}))
