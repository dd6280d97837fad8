"""Tensors in pieces: every element in one of them, and equal parts for all ranks; files as safetensors has them."""

import json
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save as encoded_by_the_library

from disttrain import checkpoint
from disttrain.checkpoint import writing
from disttrain.checkpoint.format import encode, encode_manifest
from disttrain.checkpoint.pieces import Piece, Snapshot, share
from disttrain.checkpoint.storage import storage
from disttrain.checkpoint.writing import write
from disttrain.errors import CheckpointDamagedError
from tests.checkpoint import shelf

DTYPES = ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32",
          "float64", "complex64"]  # fmt: skip
shapes = st.lists(st.integers(0, 5), max_size=3)
arrays = st.dictionaries(st.text(max_size=5), st.tuples(st.sampled_from(DTYPES), shapes), max_size=6)


def made(kinds):
    """Return arrays of these dtypes and shapes, each with numbers of its own."""
    return {n: np.arange(k, k + np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
            for k, (n, (dtype, shape)) in enumerate(kinds.items())}  # fmt: skip


@given(arrays)
@settings(deadline=None, derandomize=True)
def test_a_file_has_the_bytes_that_the_library_writes(kinds):
    tensors = made(kinds)
    assert b"".join(encode({n: Piece(array=a) for n, a in tensors.items()})) == encoded_by_the_library(tensors)


@given(arrays, arrays, st.integers(1, 7))
@settings(deadline=None, derandomize=True)
def test_pieces_are_equal_parts_that_make_the_whole(one, two, world_size):
    tensors = {"one": made(one), "two": made(two)}
    shares = [share(tensors, rank, world_size) for rank in range(world_size)]
    for group, held in tensors.items():
        for name, array in held.items():
            parts = [s[group][name] for s in shares if name in s.get(group, {})]
            if parts[0].of is None:
                (whole,) = parts
                np.testing.assert_array_equal(whole.array, array, strict=True)
            else:
                assert [p.start for p in parts] == np.cumsum([0, *(p.array.size for p in parts)])[:-1].tolist()
                np.testing.assert_array_equal(np.concatenate([p.array for p in parts]), array.reshape(-1), strict=True)
    total = sum(a.nbytes for held in tensors.values() for a in held.values())
    for s in shares:
        # a border may move by less than an element, which has 8 bytes at most
        assert abs(sum(p.array.nbytes for held in s.values() for p in held.values()) - total / world_size) < 1 + 8


def test_a_snapshot_is_a_copy_in_the_same_memory_each_time():
    array, snapshot = np.arange(4.0), Snapshot()
    first = snapshot.take({"model": {"x": Piece(array=array)}})["model"]["x"].array
    array += 1
    np.testing.assert_array_equal(first, np.arange(4.0))
    second = snapshot.take({"model": {"x": Piece(array=array)}})["model"]["x"].array
    assert second is first
    np.testing.assert_array_equal(second, array)
    other = snapshot.take({"model": {"x": Piece(array=np.ones(5))}})["model"]["x"].array
    np.testing.assert_array_equal(other, np.ones(5))


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_what_was_written_in_pieces_is_loaded_whole(tmp_path, world_size):
    place = storage(tmp_path)
    threads = [
        threading.Thread(
            target=write,
            args=(place, share(shelf.TENSORS, rank, world_size), shelf.VALUES),
            kwargs={"keep": checkpoint.Keep(), "token": "t", "rank": rank, "writers": world_size},
        )
        for rank in range(world_size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = checkpoint.load(tmp_path)
    assert found.values == shelf.VALUES
    for group, held in shelf.TENSORS.items():
        assert found.tensors[group].keys() == held.keys()
        for name, array in held.items():
            np.testing.assert_array_equal(found.tensors[group][name], array, strict=True)
    assert not list((tmp_path / "checkpoint-000001").glob("part*"))


def forged(path, **changes):
    """Return a checkpoint of one tensor in two pieces, of which the manifest says something else."""
    tensors = {"model": {"x": np.arange(6.0).reshape(2, 3)}}
    place = storage(path)
    held = [share(tensors, rank, 2) for rank in range(2)]
    folder = place.make_draft("t", "checkpoint-000001")
    files = []
    for rank in range(2):
        files += writing._write_files(place, folder, held[rank], rank)
    place.commit("t", "checkpoint-000001", encode_manifest(files, None, {}))

    def change(body):
        body["files"]["model.1.safetensors"]["tensors"]["x"].update(changes)

    shelf.forge(path / "checkpoint-000001", change)
    return path


def test_a_forgery_without_harm_is_loaded(tmp_path):
    np.testing.assert_array_equal(checkpoint.load(forged(tmp_path)).tensors["model"]["x"], np.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize(
    "changes",
    [{"start": 2}, {"start": 4}, {"start": -1}, {"start": None}, {"start": 1e9}, {"of": [2, 4]}, {"of": [2**40, 2**40]},
     {"of": [-2, -3]}, {"of": None}, {"of": "x"}, {"of": [6]}],
    ids=json.dumps,
)  # fmt: skip
def test_pieces_that_make_no_whole_are_refused(tmp_path, changes):
    with pytest.raises(CheckpointDamagedError, match="the pieces of 'x' do not make a whole"):
        checkpoint.load(forged(tmp_path, **changes))
