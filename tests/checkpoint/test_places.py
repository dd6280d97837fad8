"""Where checkpoints lie: disks that are full or in the way, other writers, object stores."""

import importlib
import re
import subprocess
import sys
import textwrap
import threading
import uuid
from pathlib import Path

import fsspec
import numpy as np
import pytest

from disttrain import checkpoint
from disttrain.comm import threads
from disttrain.errors import CheckpointDamagedError, CheckpointError
from disttrain.training import saving
from tests.checkpoint import shelf

pytestmark = pytest.mark.timeout(60)


def start(code, *args):
    """Start Python with `code` in a process of its own."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("inner", ["", "run", "a/b"])
def test_a_file_in_place_of_a_directory_is_named(tmp_path, inner):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(
        CheckpointError, match=f"{re.escape(str(file / inner))}: a checkpoint of [0-9]+ bytes could not be"
    ):
        shelf.save(file / inner)
    assert file.read_text() == "mine"
    assert not checkpoint.exists(file / inner)


def test_a_full_disk_is_named_and_the_old_checkpoint_stays(tmp_path):
    shelf.save(tmp_path, 1)
    process = start(
        """
        import resource, sys
        import numpy as np
        from disttrain import checkpoint, errors
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            checkpoint.save(sys.argv[1], {"small": {"x": np.ones(9)}, "large": {"x": np.ones(50_000)}}, None)
        except errors.CheckpointError as error:
            print(error)
        """,
        tmp_path,
    )
    out, _ = process.communicate()
    assert re.search(
        f"{tmp_path}: a checkpoint of 40[0-9]+ bytes could not be written: File too large; those written", out
    ), out
    assert shelf.names(tmp_path) == ["checkpoint-000001"]
    assert shelf.number_in(tmp_path) == 1


def test_processes_that_save_at_once_both_succeed_with_different_numbers(tmp_path):
    code = """
        import sys
        from tests.checkpoint import shelf
        print("ready", flush=True)
        sys.stdin.readline()
        for number in range(10):
            print(shelf.save(sys.argv[1], number, keep=100))
        """
    processes = [start(code, tmp_path) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    written = [process.communicate()[0].split() for process in processes]
    numbers = [sorted(int(place[-6:]) for place in places) for places in written]
    assert [len(own) for own in numbers] == [10, 10]
    assert sorted(numbers[0] + numbers[1]) == list(range(1, 21))
    assert len(shelf.names(tmp_path)) == 20
    for name in shelf.names(tmp_path):
        shelf.number_in(tmp_path / name)


def test_a_reader_beside_a_writer_always_finds_a_whole_one(tmp_path, caplog):
    shelf.save(tmp_path, 0)
    done = threading.Event()

    def write():
        for number in range(1, 40):
            shelf.save(tmp_path, number)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = []
    while not done.is_set():
        seen.append(shelf.number_in(tmp_path))
    writer.join()
    assert seen == sorted(seen)
    assert shelf.number_in(tmp_path) == 39
    assert caplog.records == []


def test_one_that_is_removed_while_it_is_read_is_not_called_damaged(tmp_path, monkeypatch, caplog):
    shelf.save(tmp_path, 1)
    read, numbers = checkpoint._load, iter([2, 3])

    def slowly(place, name):
        for number in numbers:
            shelf.save(tmp_path, number)
        return read(place, name)

    monkeypatch.setattr(checkpoint, "_load", slowly)
    assert shelf.number_in(tmp_path) == 3
    assert caplog.records == []


def test_a_writer_that_never_ends_is_named(tmp_path, monkeypatch):
    storage = importlib.import_module("disttrain.checkpoint.storage")
    monkeypatch.setattr(storage, "_LOCK_TIMEOUT_S", 0.2)
    with (
        storage.storage(tmp_path).lock(),
        pytest.raises(CheckpointError, match="another process has been writing here"),
    ):
        shelf.save(tmp_path)


@pytest.mark.parametrize("form", [str, Path, lambda p: f"file://{p}"])
def test_a_path_may_be_written_in_several_ways(tmp_path, form):
    shelf.save(form(tmp_path), 1)
    assert shelf.number_in(form(tmp_path)) == 1
    assert shelf.names(tmp_path) == ["checkpoint-000001"]


def test_a_relative_path_is_that_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shelf.save("run", 1) == f"{tmp_path}/run/checkpoint-000001"
    assert shelf.number_in("run") == 1


@pytest.mark.parametrize("path", ["nope://bucket/run", "s4://x"])
def test_an_unknown_protocol_is_named(path):
    with pytest.raises(CheckpointError, match=f"{path}: neither a directory nor an address .* Protocol not known"):
        shelf.save(path)
    with pytest.raises(CheckpointError, match="Protocol not known"):
        checkpoint.load(path)


@pytest.fixture
def remote():
    address = f"memory://{uuid.uuid4()}/run"
    yield address
    fsspec.filesystem("memory").rm(address, recursive=True)


def test_an_object_store_holds_checkpoints(remote, caplog):
    assert not checkpoint.exists(remote)
    with pytest.raises(CheckpointError, match="there is no checkpoint here"):
        checkpoint.load(remote)
    places = [shelf.save(remote, number) for number in range(1, 4)]
    assert shelf.number_in(remote) == 3
    assert [shelf.number_in(place) for place in places[1:]] == [2, 3]  # what save returned can be loaded
    with pytest.raises(CheckpointError, match="there is no checkpoint here"):
        checkpoint.load(places[0])

    memory = fsspec.filesystem("memory")
    memory.pipe_file(f"{places[2]}/model.safetensors", b"damaged")
    assert shelf.number_in(remote) == 2
    assert f"{places[2]}: model.safetensors: its SHA-256 is" in caplog.text
    memory.rm_file(f"{places[2]}/model.safetensors")
    assert shelf.number_in(remote) == 2
    memory.pipe_file(f"{places[1]}/model.safetensors", b"x" * 10_000)
    with pytest.raises(CheckpointDamagedError, match="10000 bytes, at most"):
        checkpoint.load(remote)


def test_in_an_object_store_one_without_its_manifest_does_not_count(remote, monkeypatch, caplog):
    shelf.save(remote, 1)
    real = fsspec.implementations.memory.MemoryFileSystem.pipe_file

    def fails(self, path, value, *args, **kwargs):
        if path.endswith("manifest.json"):
            raise OSError("connection lost")
        return real(self, path, value, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(fsspec.implementations.memory.MemoryFileSystem, "pipe_file", fails)
        with pytest.raises(CheckpointError, match="could not be written: connection lost"):
            shelf.save(remote, 2)
    assert shelf.number_in(remote) == 1
    assert caplog.records == []
    assert shelf.save(remote, 3).endswith("/checkpoint-000002")
    assert shelf.number_in(remote) == 3


@pytest.mark.parametrize("world_size", [1, 3])
def test_all_ranks_read_what_rank_0_reads(tmp_path, world_size):
    shelf.save(tmp_path, 1)

    def read(comm):
        # only rank 0 sees the disk
        return saving.read(comm, tmp_path if comm.rank == 0 else "/nowhere")

    for found in threads.run(world_size, read):
        assert found.values == {**shelf.VALUES, "number": 1}
        assert found.place == f"{tmp_path}/checkpoint-000001"
        for group, arrays in shelf.TENSORS.items():
            for name, array in arrays.items():
                np.testing.assert_array_equal(found.tensors[group][name], array, strict=True)
        np.testing.assert_array_equal(found.tensors["model"]["number"], np.array(1), strict=True)


def test_all_ranks_hear_of_a_failure_to_write_or_to_read(tmp_path):
    (tmp_path / "file").write_text("")

    def outcomes(comm):
        found = []
        for action in (saving.write, saving.read):
            with pytest.raises(CheckpointError) as caught:
                action(comm, tmp_path / "file", *([{}, None] if action is saving.write else []))
            found.append(str(caught.value))
        return found

    results = threads.run(3, outcomes)
    for rank, (writing, reading) in enumerate(results):
        assert f"{tmp_path}/file: a checkpoint of" in writing
        assert f"{tmp_path}/file: there is no checkpoint here" in reading
        assert writing.startswith("rank 0 of 3: ") == (rank > 0)
