"""A crash at any moment of saving leaves what was there before, and nothing that stays in the way."""

import importlib
import os
import shutil
import tempfile

import pytest

from disttrain.errors import CheckpointError
from tests.checkpoint import shelf

storage = importlib.import_module("disttrain.checkpoint.storage")


class Crash(BaseException):
    """The process ends here: nothing that comes after is done."""


class Faults:
    """Counts operations on files, and lets the k-th fail, or end the process."""

    def __init__(self, monkeypatch, fails_at=None, error=None):
        self.count = 0
        self.kinds = []
        self.fails_at = fails_at
        self.error = error
        self.is_dead = False
        monkeypatch.setattr(storage, "open", self.open, raising=False)
        monkeypatch.setattr(os, "fsync", self.watched("fsync", os.fsync))
        monkeypatch.setattr(os, "rename", self.watched("rename", os.rename))
        monkeypatch.setattr(shutil, "rmtree", self.watched("rmtree", shutil.rmtree))

    def watched(self, kind, function):
        def watching(*args, **kwargs):
            self.happens(kind)
            return function(*args, **kwargs)

        return watching

    def happens(self, kind):
        if self.is_dead:
            raise Crash  # the clearing-up does not happen either
        self.count += 1
        self.kinds.append(kind)
        if self.count == self.fails_at:
            self.is_dead = isinstance(self.error, Crash)
            raise self.error

    def open(self, path, mode="r"):
        self.happens("open")
        file = open(path, mode)  # noqa: SIM115  # the caller closes it
        if "b" in mode and "x" in mode:
            return Half(file, self)
        return file


class Half:
    """A file of which half is written when writing fails."""

    def __init__(self, file, faults):
        self.file, self.faults = file, faults

    def write(self, content):
        self.file.write(content[: len(content) // 2])
        self.file.flush()
        self.faults.happens("write")
        self.file.write(content[len(content) // 2 :])

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


def operations():
    """Return how many operations a save takes that also removes an old checkpoint."""
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        shelf.save(directory, 1)
        shelf.save(directory, 2)
        faults = Faults(patch)
        shelf.save(directory, 3)
        return faults.kinds


OPERATIONS = operations()


def test_the_faults_are_those_of_a_save():
    files = ["open", "write", "fsync"] * 3
    # three files and their directory, the rename, the directory that it is in; then the oldest is removed
    expected = [*files, "fsync", "rename", "fsync", "rename", "rmtree"]
    assert expected == OPERATIONS


COMMITTED = OPERATIONS.index("rename")  # from the operation after it on, the new one is there


@pytest.mark.parametrize("number", range(len(OPERATIONS)), ids=lambda n: f"{n}-{OPERATIONS[n]}")
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Crash()], ids=["error", "crash"])
def test_a_failure_at_any_operation(tmp_path, number, error):
    if isinstance(error, OSError) and OPERATIONS[number] == "rmtree":
        return  # it reports no error: the next save does what was left
    shelf.save(tmp_path, 1)
    shelf.save(tmp_path, 2)
    with pytest.MonkeyPatch.context() as patch:
        Faults(patch, number + 1, error)
        expected = Crash if isinstance(error, Crash) else CheckpointError
        text = None if isinstance(error, Crash) else f"{tmp_path}: a checkpoint of .* No space left on device"
        with pytest.raises(expected, match=text):
            shelf.save(tmp_path, 3)
    # what was there still is, whole; or the new one is there, whole
    assert shelf.number_in(tmp_path) == (3 if number > COMMITTED else 2)
    left = [name for name in shelf.names(tmp_path) if name.startswith(".tmp-")]
    if isinstance(error, OSError):
        assert left == []  # an error is cleared up at once
    # and the next one is as any other
    shelf.save(tmp_path, 4)
    assert shelf.number_in(tmp_path) == 4
    names = shelf.names(tmp_path)
    assert len(names) == 2
    assert not any(name.startswith(".tmp-") for name in names)


def test_the_order_is_what_makes_it_durable(tmp_path, monkeypatch):
    # each file is flushed before the rename, and the directory after it
    faults = Faults(monkeypatch)
    shelf.save(tmp_path / "new", 1)
    rename = faults.kinds.index("rename")
    assert faults.kinds[:rename].count("write") == 3
    assert faults.kinds[rename - 1] == "fsync"
    assert faults.kinds[rename + 1] == "fsync"
    assert faults.kinds[:rename].count("fsync") == 3 + 1 + 1  # files, their directory, and the parent of a new one
