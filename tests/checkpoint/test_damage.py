"""A damaged checkpoint is noticed whatever happened to it, named, and the one before it is used."""

import json
import os
import random
import shutil

import numpy as np
import pytest

from disttrain import checkpoint
from disttrain.errors import CheckpointDamagedError, CheckpointError
from tests.checkpoint import shelf

FILES = ["manifest.json", "model.safetensors", "optimizer.safetensors"]


@pytest.fixture
def two(tmp_path):
    """Return a directory with checkpoints 1 and 2."""
    shelf.save(tmp_path, 1)
    shelf.save(tmp_path, 2)
    return tmp_path


def newest(two):
    return two / "checkpoint-000002"


def assert_noticed(two, caplog, *texts):
    """Assert that checkpoint 1 is used instead of 2, with a warning that has `texts` in it."""
    caplog.clear()
    assert shelf.number_in(two) == 1, texts
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    for text in ("checkpoint damaged, trying the one before it: ", str(newest(two)), *texts):
        assert text in record.message
    with pytest.raises(CheckpointDamagedError):
        checkpoint.load(newest(two)) if (newest(two) / "manifest.json").exists() else _raise()


def _raise():
    raise CheckpointDamagedError


def test_without_damage_there_is_no_warning(two, caplog):
    assert shelf.number_in(two) == 2
    assert caplog.records == []


@pytest.mark.parametrize("name", FILES)
def test_every_byte_counts(two, caplog, name):
    # one bit, chosen by a seed, of each byte of the file
    path = newest(two) / name
    whole = path.read_bytes()
    bits = random.Random(0)
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bits.randrange(8)
        path.write_bytes(damaged)
        caplog.clear()
        assert checkpoint.load(two).values["number"] == 1, place
        assert name in caplog.records[0].message
    path.write_bytes(whole)
    assert shelf.number_in(two) == 2


def test_a_number_written_otherwise_is_a_change_too(two, caplog):
    # one bit makes 1e-07 of 1E-07: the same value, but not what was written
    path = newest(two) / "manifest.json"
    text = path.read_text()
    assert text.count("1e-07") == 1
    path.write_text(text.replace("1e-07", "1E-07"))
    assert_noticed(two, caplog, "manifest.json: not as it was written")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0, 1, 8, 0.5, -1])
def test_a_truncated_file(two, caplog, name, keep):
    path = newest(two) / name
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if keep == 0.5 else keep])
    assert_noticed(two, caplog, name)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("tail", [b"\0", b" ", b"x" * 100_000])
def test_an_extended_file(two, caplog, name, tail):
    with open(newest(two) / name, "ab") as file:
        file.write(tail)
    assert_noticed(two, caplog, name)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(two, caplog, name):
    (newest(two) / name).unlink()
    assert_noticed(two, caplog, name, "cannot be read: No such file or directory")


def test_an_empty_directory(two, caplog):
    shutil.rmtree(newest(two))
    newest(two).mkdir()
    assert_noticed(two, caplog, "manifest.json")


def test_a_file_in_place_of_the_directory(two, caplog):
    shutil.rmtree(newest(two))
    newest(two).write_text("")
    assert_noticed(two, caplog, "Not a directory")


def test_swapped_files(two, caplog):
    one, other, aside = (newest(two) / name for name in ("model.safetensors", "optimizer.safetensors", "aside"))
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
    assert_noticed(two, caplog, "model.safetensors")


@pytest.mark.parametrize("name", FILES[:2])
def test_a_file_of_another_checkpoint(two, caplog, name):
    shutil.copy(two / "checkpoint-000001" / name, newest(two) / name)
    if name == "manifest.json":
        # whole in itself, but the tensors are not its own
        assert_noticed(two, caplog, "model.safetensors: its SHA-256 is")
    else:
        assert_noticed(two, caplog, name)


def test_a_directory_in_place_of_a_file(two, caplog):
    (newest(two) / "model.safetensors").unlink()
    (newest(two) / "model.safetensors").mkdir()
    assert_noticed(two, caplog, "model.safetensors")


def test_the_message_says_how_much_of_a_file_is_there(two, caplog):
    path = newest(two) / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-3])
    assert_noticed(two, caplog, f"({len(content) - 3} of {len(content)} bytes are there)")


def test_all_are_damaged(two):
    for number in (1, 2):
        (two / f"checkpoint-00000{number}" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointDamagedError) as caught:
        checkpoint.load(two)
    text = str(caught.value)
    assert f"none of 2 checkpoints in {two} is whole" in text
    assert text.count("model.safetensors: its SHA-256 is") == 2
    assert checkpoint.exists(two)  # so that a run does not begin anew over them


def test_the_next_one_is_whole_again(two):
    (newest(two) / "model.safetensors").write_bytes(b"")
    shelf.save(two, 3)
    assert shelf.names(two) == ["checkpoint-000002", "checkpoint-000003"]
    assert shelf.number_in(two) == 3


def test_a_newer_format_is_not_called_damaged(two):
    shelf.forge(newest(two), lambda body: body.update(version=2))
    with pytest.raises(
        CheckpointError, match="'disttrain checkpoint' version 2; this version of disttrain reads"
    ) as caught:
        checkpoint.load(two)
    assert not isinstance(caught.value, CheckpointDamagedError)


def test_files_that_the_manifest_does_not_list_are_not_read(two):
    os.mkfifo(newest(two) / "other.safetensors")
    assert shelf.number_in(two) == 2
    assert json.loads((newest(two) / "manifest.json").read_bytes())["body"]["format"] == "disttrain checkpoint"


def test_a_flip_of_one_bit_in_500_random_places_is_named(tmp_path, caplog):
    # of a checkpoint of 200 kB, in pieces that two ranks wrote
    tensors = {"model": {"x": np.random.default_rng(0).normal(size=(100, 125))}, "optimizer": {"y": np.zeros(25_000)}}
    for number in (1, 2):
        shelf.save_by_two(tmp_path, number, tensors=tensors)
    files = sorted(path for path in newest(tmp_path).iterdir())
    assert len(files) == 4  # a part of each rank of one group, and the other group's
    chance = random.Random(0)
    for _ in range(500):
        path = chance.choices(files, [file.stat().st_size for file in files])[0]
        place, bit = chance.randrange(path.stat().st_size), chance.randrange(8)
        flip(path, place, bit)
        caplog.clear()
        assert checkpoint.load(tmp_path).values["number"] == 1, (path, place)
        assert path.name in caplog.records[0].message
        flip(path, place, bit)
    caplog.clear()
    assert checkpoint.load(tmp_path).values["number"] == 2
    assert caplog.records == []


def flip(path, place, bit):
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))


def test_the_newest_is_told_by_its_number_whatever_the_clock_said(two):
    for number, time_s in ((1, 2_000_000_000), (2, 0)):
        os.utime(two / f"checkpoint-00000{number}", (time_s, time_s))
    assert shelf.number_in(two) == 2
