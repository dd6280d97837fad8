"""A rank that has waited long says so, now and then, unless a supervisor does."""

import pytest

from disttrain import progress
from disttrain.comm.waiting import Patience


def seconds(caplog, patience):
    """Return the whole seconds, up to 300, after which a warning comes."""
    found = []
    for second in range(300):
        patience.check(100.0 + second)
        found += [second] * len(caplog.records)
        caplog.clear()
    return found


def test_it_warns_after_thirty_seconds_and_each_time_they_have_doubled(caplog):
    assert seconds(caplog, Patience(0, 1, 100.0)) == [30, 60, 120, 240]


def test_the_warning_names_both_ranks_the_call_and_its_place(caplog):
    progress.waits(progress.call(23, "all_reduce", "f", 4, 4096))
    try:
        Patience(4, 1, 100.0).check(140.0)
    finally:
        progress.goes_on()
    (record,) = caplog.records
    words = "rank 4 has waited 40 s for rank 1 in all_reduce 23 (float32, 4096 bytes), called at "
    assert record.getMessage().startswith(words + __file__)


@pytest.fixture
def _supervised(tmp_path):
    progress.keep(tmp_path / "progress.0", 0, 2)
    yield
    progress._forget()


@pytest.mark.usefixtures("_supervised")
def test_under_a_supervisor_it_is_silent(caplog):
    assert seconds(caplog, Patience(0, 1, 100.0)) == []
