"""Tests among processes: every rank runs the same tests, and rank 0 alone reports those that pass.

`make mpi` starts them by mpiexec, `make shm` by disttrain's own launcher, without MPI.
"""

import io
import os

import pytest

from disttrain import comm as dt_comm
from disttrain import env
from tests.conftest import STDERR


@pytest.fixture(scope="session")
def comm():
    """Return this rank's communicator, over the transport of its launcher; over MPI also when it is alone."""
    return dt_comm.init(env.transport() if env.transport() in ("shm", "tcp") else "mpi")


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session):
    if env.place().rank > 0:
        session.config.get_terminal_writer()._file = io.StringIO()
        session.config.pluginmanager.register(FailuresOnly(session.config))


class FailuresOnly:
    """Prints what failed on this rank."""

    def __init__(self, config):
        self.config = config

    def pytest_runtest_logreport(self, report):
        if report.failed:
            text = f"\nrank {env.place().rank}: {report.nodeid}\n{report.longreprtext}\n"
            os.write(self.config.stash[STDERR], text.encode())

    pytest_collectreport = pytest_runtest_logreport
