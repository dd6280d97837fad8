"""Jobs in which one rank fails on purpose: the program, and a table of what became of each."""

import dataclasses
import statistics

import pytest

from tests.launch.conftest import mpi, program

__all__ = ["mpi", "program", "table"]

_ROWS = pytest.StashKey[list["Row"]]()
_PAUSES_S = pytest.StashKey[list[float]]()
_FIGURES = pytest.StashKey[list[str]]()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What became of a job."""

    failure: str
    phase: str
    ranks: int
    transport: str
    took_s: float
    said: str


@pytest.fixture
def table(request):
    """Return the rows of the table that ends the session."""
    return request.config.stash.setdefault(_ROWS, [])


@pytest.fixture
def pauses_s(request):
    """Return seconds from a kill to the next step, of all tests of this session; their median ends it."""
    return request.config.stash.setdefault(_PAUSES_S, [])


@pytest.fixture
def figures(request):
    """Return lines that end the session."""
    return request.config.stash.setdefault(_FIGURES, [])


def pytest_terminal_summary(terminalreporter, config):
    for line in config.stash.get(_FIGURES, []) if config.option.verbose > 0 else ():
        terminalreporter.write_line(line)
    if (pauses_s := config.stash.get(_PAUSES_S, [])) and config.option.verbose > 0:
        terminalreporter.write_line(
            f"{len(pauses_s)} restarts, from the kill to the next step: median {statistics.median(pauses_s):.1f} s, "
            f"{min(pauses_s):.1f} to {max(pauses_s):.1f} s"
        )
    rows = config.stash.get(_ROWS, [])
    if rows and config.option.verbose > 0:
        terminalreporter.write_line(
            "| failure | phase | ranks | transport | seconds | said |\n|---|---|---|---|---|---|"
        )
    for row in rows if config.option.verbose > 0 else ():
        cells = (row.failure, row.phase, row.ranks, row.transport, f"{row.took_s:.1f}", row.said)
        terminalreporter.write_line(f"| {' | '.join(map(str, cells))} |")


@pytest.fixture(scope="module")
def undisturbed():
    """Return what a run prints that nobody disturbs; filled by the tests of a module."""
    return {}
