"""A crash at any moment of saving leaves what was there before, and nothing that stays in the way."""

import errno
import os
import tempfile

import pytest

from disttrain.errors import CheckpointError
from tests.checkpoint import shelf
from tests.checkpoint.faults import Crash, Faults


def operations():
    """Return the operations of a save that also removes an old checkpoint."""
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        shelf.save(directory, 1)
        shelf.save(directory, 2)
        faults = Faults(patch)
        shelf.save(directory, 3)
        return faults.done


OPERATIONS = operations()
COMMITTED = next(i for i, (kind, _, *new) in enumerate(OPERATIONS) if kind == "rename" and "checkpoint" in new[0])
HIDDEN = next(i for i, (kind, *_) in enumerate(OPERATIONS) if kind == "rename" and i > COMMITTED)


def test_the_faults_are_those_of_a_save():
    kinds = [kind for kind, *_ in OPERATIONS]
    without_writes = [kind for kind in kinds if kind != "write"]
    commit = ["mkdir", *["create", "sync"] * 3, "sync", "rename", "sync"]
    assert without_writes == [*commit, "rename", "sync", *["unlink"] * 3, "rmdir"]
    assert kinds.count("write") >= 3 * 2  # of each file its header and its content, at least


@pytest.mark.parametrize("number", range(len(OPERATIONS)), ids=lambda n: f"{n}-{OPERATIONS[n][0]}")
@pytest.mark.parametrize("torn", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    "error",
    [OSError(code, os.strerror(code)) for code in (errno.ENOSPC, errno.EIO, errno.EROFS)] + [Crash()],
    ids=["ENOSPC", "EIO", "EROFS", "crash"],
)
def test_a_failure_at_any_operation(tmp_path, number, error, torn):
    shelf.save(tmp_path, 1)
    shelf.save(tmp_path, 2)
    is_reported = OPERATIONS[number][0] not in ("unlink", "rmdir") or isinstance(error, Crash)
    with pytest.MonkeyPatch.context() as patch:
        Faults(patch, number + 1, error, torn=torn, syncs=False)
        if is_reported:
            expected = Crash if isinstance(error, Crash) else CheckpointError
            text = None if isinstance(error, Crash) else f"{tmp_path}: a checkpoint of .* {error.strerror}"
            with pytest.raises(expected, match=text):
                shelf.save(tmp_path, 3)
        else:
            shelf.save(tmp_path, 3)  # the next save removes what was left
    # what was there still is, whole; or the new one is there, whole
    assert shelf.number_in(tmp_path) == (3 if number + torn > COMMITTED else 2)
    assert_each_is_whole(tmp_path)
    left = [name for name in shelf.names(tmp_path) if name.startswith(".tmp-")]
    if isinstance(error, OSError) and number < HIDDEN:
        assert left == []  # an error is cleared up at once
    # and the next one is as any other
    shelf.save(tmp_path, 4)
    assert shelf.number_in(tmp_path) == 4
    names = shelf.names(tmp_path)
    assert len(names) == 2
    assert not any(name.startswith(".tmp-") for name in names)


def assert_each_is_whole(path):
    for name in shelf.names(path):
        if name.startswith("checkpoint-"):
            shelf.number_in(path / name)


def test_the_order_is_what_makes_it_durable(tmp_path, monkeypatch):
    # each file is flushed before the rename, and the directory after it
    faults = Faults(monkeypatch)
    shelf.save(tmp_path / "new", 1)
    rename = faults.kinds.index("rename")
    assert faults.kinds[rename - 1] == "sync"
    assert faults.kinds[rename + 1] == "sync"
    assert faults.kinds[:rename].count("sync") == 3 + 1 + 1  # files, their directory, and the parent of a new one


def test_no_room_is_said_with_what_there_is(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        Faults(patch, 3, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(
            CheckpointError, match=r"No space left on device \(\d+ bytes are free\); those written before"
        ):
            shelf.save(tmp_path, 1)
