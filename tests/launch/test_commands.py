"""Launchers are pure functions from a job to command lines; whose mpiexec there is, is found apart."""

import dataclasses
import importlib.metadata
import itertools
import sys
from pathlib import Path

import pytest

from disttrain import env
from disttrain.errors import LaunchError
from launch import local, mpirun
from launch.job import Command, Job
from launch.mpirun import Mpi, find_mpi

JOB = Job(workers=2, script="train.py", arguments=("--name", "a b"), python="/env/bin/python")
WORKER = ("/env/bin/python", "-P", "-m", "launch.worker", "train.py", "--name", "a b")
ALONE = Job(workers=1, script="train.py", python="/env/bin/python")


def test_local_starts_each_worker_itself():
    assert local.commands(ALONE) == [Command(argv=WORKER[:5])]
    sizes = {"DISTTRAIN_WORLD_SIZE": "2", "DISTTRAIN_LOCAL_SIZE": "2"}
    assert local.commands(JOB) == [
        Command(argv=WORKER, env={"DISTTRAIN_RANK": "0", "DISTTRAIN_LOCAL_RANK": "0", **sizes}),
        Command(argv=WORKER, env={"DISTTRAIN_RANK": "1", "DISTTRAIN_LOCAL_RANK": "1", **sizes}),
    ]


def test_mpich_labels_what_does_not_pass_through_the_supervisor():
    mpi = Mpi(mpiexec="/env/bin/mpiexec", flavour="mpich")
    assert mpirun.command(JOB, mpi) == Command(argv=("/env/bin/mpiexec", "-n", "2", "-prepend-rank", *WORKER))
    assert mpirun.command(ALONE, mpi) == Command(argv=("/env/bin/mpiexec", "-n", "1", *WORKER[:5]))


def test_open_mpi_runs_as_root_on_more_workers_than_cores_and_leaves_them_all_cores():
    options = ("-n", "2", "--oversubscribe", "--bind-to", "none", "--tag-output")
    assert mpirun.command(JOB, Mpi(mpiexec="/usr/bin/mpirun", flavour="openmpi")) == Command(
        argv=("/usr/bin/mpirun", *options, *WORKER),
        env={"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"},
    )


@pytest.mark.parametrize(("fewest", "survives"), [(0, False), (1, True), (2, False)])
def test_open_mpi_loses_ranks_alone_where_the_job_may_go_on_with_fewer(fewest, survives):
    mpi = Mpi(mpiexec="mpiexec", flavour="openmpi", may_lose_ranks=True)
    line = mpirun.command(dataclasses.replace(JOB, min_workers=fewest), mpi).argv
    assert ("--with-ft" in line) == survives


def test_what_the_user_says_to_an_mpi_goes_first_and_ranks_elsewhere_are_heard_of(monkeypatch):
    for name in ("DISTTRAIN_SECRET", "DISTTRAIN_SECRET_FILE", "DISTTRAIN_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(mpirun, "find_mpi", lambda: Mpi(mpiexec="mpirun", flavour="openmpi", may_lose_ranks=True))
    job = dataclasses.replace(JOB, options={"mpiexec": "--hostfile 'my hosts'"})
    (line,) = mpirun.commands(job)
    assert line.argv[:7] == ("/env/bin/python", "-P", "-m", "launch.gate", "2", "", "mpirun")
    assert line.argv[7:11] == ("--hostfile", "my hosts", "-n", "2")
    passed_on = [name for option, name in itertools.pairwise(line.argv) if option == "-x"]
    assert {"DISTTRAIN_SECRET", "DISTTRAIN_SUPERVISOR"} <= set(passed_on)
    assert len(line.env["DISTTRAIN_SECRET"]) >= 16
    (line,) = mpirun.commands(dataclasses.replace(job, min_workers=1))  # it may go on without a rank
    assert line.argv[0] == "mpirun"


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({"HYDRA_HOST_FILE": "hosts"}, True),
        ({"SLURM_JOB_NUM_NODES": "2"}, True),
        ({"SLURM_JOB_NUM_NODES": "1"}, False),
        ({}, False),
    ],
)
def test_hosts_that_an_mpi_finds_in_its_environment_are_known(environ, names):
    assert env.names_hosts(environ) == names


def test_an_mpi_of_unknown_flavour_gets_no_options():
    assert mpirun.command(JOB, Mpi(mpiexec="mpiexec", flavour="other")).argv == ("mpiexec", "-n", "2", *WORKER)


@pytest.mark.parametrize("flavour", ["mpich", "openmpi", "other"])
def test_an_argument_that_mpiexec_would_take_for_itself_is_refused(flavour):
    with pytest.raises(LaunchError, match="':'"):
        mpirun.command(Job(workers=2, script="s.py", arguments=("a", ":")), Mpi(mpiexec="mpiexec", flavour=flavour))


@pytest.mark.parametrize(
    ("version", "flavour", "may_lose_ranks"),
    [
        ("HYDRA build details:\n    Version: 5.0.2", "mpich", False),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.13", "mpich", False),
        ("mpiexec (Open MPI) 5.0.11", "openmpi", True),
        ("mpirun (Open MPI) 4.1.4", "openmpi", False),
        ("something else 1.0", "other", False),
    ],
)
def test_the_mpi_on_the_path_says_whose_it_is(tmp_path: Path, version, flavour, may_lose_ranks):
    program = tmp_path / "mpirun"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{version}\nEND\n")
    program.chmod(0o755)
    expected = Mpi(mpiexec=str(program), flavour=flavour, may_lose_ranks=may_lose_ranks)
    assert find_mpi(wheels=(), path=str(tmp_path)) == expected


def test_the_mpi_of_a_wheel_comes_before_the_one_on_the_path(tmp_path: Path):
    try:
        importlib.metadata.distribution("mpich")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("this environment has no MPI from a wheel")
    program = tmp_path / "mpiexec"
    program.write_text("#!/bin/sh\necho other\n")
    program.chmod(0o755)
    found = find_mpi(path=str(tmp_path))
    assert Path(found.mpiexec).parent == Path(sys.prefix, "bin")
    assert found.flavour == "mpich"
