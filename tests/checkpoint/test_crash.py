"""A crash or an error at any operation of saving leaves what was there before, and nothing that stays in the way.

Each scenario is a sequence of saves, of which the last meets the fault: at each operation in turn, before it and after
it (of a write: when half is written), and of each kind.
"""

import errno
import os
import tempfile
from pathlib import Path

import pytest

from disttrain.errors import CheckpointError
from tests.checkpoint import shelf
from tests.checkpoint.faults import Crash, Faults

SCENARIOS = {  # what is saved before, by how many, and how many stay
    "the first": (0, shelf.save, 2),
    "one that removes another": (2, shelf.save, 2),
    "by two ranks": (2, shelf.save_by_two, 2),
    "one that removes three": (3, shelf.save, 1),
}
FAULTS = {"crash": Crash()}
for _code in ("ENOSPC", "EIO", "EROFS", "EMFILE"):
    FAULTS[_code] = OSError(getattr(errno, _code), os.strerror(getattr(errno, _code)))
SHORT = (("one that removes another", "ENOSPC"), ("one that removes another", "crash"), ("by two ranks", "crash"))
IS_SILENT = ("unlink", "rmdir")  # of what is hidden already: the next save removes it


def prepared(folder, scenario):
    """Save what the scenario begins with; return the directory, and the save that is to fail."""
    path = Path(folder) / "run"
    before, save, keep = SCENARIOS[scenario]
    for number in range(1, before + 1):
        shelf.save(path, number, keep=9)
    return path, lambda: save(path, before + 1, keep=keep)


def operations(scenario):
    """Return the operations of the save that is to fail."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        _, save = prepared(folder, scenario)
        faults = Faults(patch)
        save()
        return faults.done


OPERATIONS = {scenario: operations(scenario) for scenario in SCENARIOS}


def committed(done):
    """Return the place of the operation with which the new checkpoint is there."""
    return next(i for i, (kind, _, *new) in enumerate(done) if kind == "rename" and "checkpoint-" in Path(new[0]).name)


@pytest.fixture(autouse=True)
def _in_memory(monkeypatch):
    if os.access("/dev/shm", os.W_OK):
        monkeypatch.setattr(tempfile, "tempdir", "/dev/shm")  # thousands of small files


def test_the_faults_are_those_of_a_save():
    kinds = [kind for kind, *_ in OPERATIONS["one that removes another"]]
    commit = ["mkdir", *["create", "sync"] * 3, "sync", "rename", "sync"]
    assert [kind for kind in kinds if kind != "write"] == [*commit, "rename", "sync", *["unlink"] * 3, "rmdir"]
    assert kinds.count("write") >= 3 * 2  # of each file its header and its content, at least


def test_there_are_a_thousand_of_them():
    assert sum(len(done) for done in OPERATIONS.values()) * 2 * len(FAULTS) > 1000


@pytest.mark.parametrize(
    ("scenario", "fault"),
    [pytest.param(s, f, marks=() if (s, f) in SHORT else pytest.mark.long) for s in SCENARIOS for f in FAULTS],
)
def test_a_failure_at_any_operation(scenario, fault):
    for number in range(len(OPERATIONS[scenario])):
        for torn in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                fail_and_look(folder, scenario, number, fault, torn=torn)


def fail_and_look(folder, scenario, number, fault, *, torn):
    done, error = OPERATIONS[scenario], FAULTS[fault]
    what = f"{scenario}, {fault} {'after' if torn else 'before'} operation {number}, {done[number][:2]}"
    with pytest.MonkeyPatch.context() as patch:
        Faults(patch, syncs=False)
        path, save = prepared(folder, scenario)
    before = SCENARIOS[scenario][0]
    with pytest.MonkeyPatch.context() as patch:
        Faults(patch, number + 1, error, torn=torn, syncs=False)
        if fault == "crash":
            with pytest.raises(Crash):
                save()
        elif done[number][0] in IS_SILENT and number > committed(done):
            save()
        else:
            with pytest.raises(CheckpointError) as caught:
                save()
            assert str(path) in str(caught.value), what
            assert error.strerror in str(caught.value), what
    is_there = number + torn > committed(done)
    # what was there still is, whole; or the new one is there, whole
    if before or is_there:
        assert shelf.number_in(path) == (before + 1 if is_there else before), what
    listed = shelf.names(path) if path.exists() else []
    for name in listed:
        if name.startswith("checkpoint-"):
            shelf.number_in(path / name)
    if fault != "crash" and not is_there and done[number][0] not in IS_SILENT:
        assert not [name for name in listed if name.startswith(".tmp-")], what  # an error is cleared up at once
    # and the next one is as any other
    with pytest.MonkeyPatch.context() as patch:
        Faults(patch, syncs=False)
        shelf.save(path, 9)
    assert shelf.number_in(path) == 9, what
    assert len(shelf.names(path)) <= 2, what
    assert not [name for name in shelf.names(path) if name.startswith(".tmp-")], what


def test_no_room_is_said_with_what_there_is(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        Faults(patch, 3, FAULTS["ENOSPC"])
        with pytest.raises(
            CheckpointError, match=r"No space left on device \(\d+ bytes are free\); those written before"
        ):
            shelf.save(tmp_path, 1)
