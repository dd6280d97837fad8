"""Every rank says where it stands before a test's time is up; skipped tests are noted for the end of `make test`.

pytest-timeout ends the first rank that it reaches; the launcher then kills the others, silently.
"""

import faulthandler
import os
import threading

import pytest

from disttrain import env

# Enough for every rank to print, one after the other, before the first of them is ended.
MARGIN_S = 5.0
BETWEEN_RANKS_S = 0.3

STDERR = pytest.StashKey[int]()  # a descriptor that output capturing leaves alone


def pytest_sessionstart(session):
    capture = session.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        session.config.stash[STDERR] = os.dup(2)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    limit_s = _limit_s(item)
    if limit_s <= MARGIN_S:
        return (yield)
    place, stderr = env.place(), item.config.stash[STDERR]
    delay_s = limit_s - MARGIN_S + BETWEEN_RANKS_S * min(place.rank, 12)
    header = f"\nrank {place.rank} of {place.world_size}, in {item.nodeid} for {delay_s:.1f} s:\n"
    timer = threading.Timer(delay_s, os.write, (stderr, header.encode()))
    timer.daemon = True
    timer.start()
    # The stacks come from a thread without Python, which no lock of the interpreter holds up.
    faulthandler.dump_traceback_later(delay_s + 0.05, file=stderr)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
        timer.cancel()
        timer.join()


def pytest_terminal_summary(terminalreporter):
    path, place = os.environ.get("SKIPPED_TESTS"), env.place()
    reports = terminalreporter.stats.get("skipped", [])
    if path and reports and place.rank == 0:
        with open(path, "a") as file:
            for report in reports:
                where = f" on {place.world_size} MPI ranks" if place.world_size > 1 else ""
                file.write(f"{report.nodeid}{where}: {report.longrepr[2].removeprefix('Skipped: ')}\n")


def _limit_s(item):
    """Return pytest-timeout's limit for `item`; 0 when it has none."""
    marker = item.get_closest_marker("timeout")
    if marker is not None:
        return float(marker.args[0] if marker.args else marker.kwargs["timeout"])
    return float(item.config.getoption("timeout") or item.config.getini("timeout") or 0)
