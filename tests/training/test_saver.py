"""Checkpoints are written beside the training: from a copy, one at a time; what goes wrong is heard by all ranks."""

import logging
import threading
import time

import numpy as np
import pytest

import disttrain as dt
from disttrain import checkpoint
from disttrain.checkpoint import Keep, disk
from disttrain.checkpoint.inspection import entries
from disttrain.checkpoint.storage import storage
from disttrain.comm import threads
from disttrain.errors import CheckpointError
from disttrain.training.saving import Saver
from tests.training import worlds

pytestmark = pytest.mark.timeout(60)

X, Y = worlds.blobs(20)


class Gate:
    """Holds up the threads that write, until it is opened; or has them fail."""

    def __init__(self, monkeypatch, is_open=True):
        self.opened, self.writers, self.error = threading.Event(), set(), None
        real = disk.write
        if is_open:
            self.opened.set()

        def write(descriptor, data):
            if threading.current_thread().name == "checkpoint writer":
                self.writers.add(threading.current_thread())
                assert self.opened.wait(30)
                if self.error is not None:
                    raise self.error
            real(descriptor, data)

        monkeypatch.setattr(disk, "write", write)


@pytest.fixture
def gate(monkeypatch):
    gate = Gate(monkeypatch)
    yield gate
    gate.opened.set()


def save(saver, path, array, **kwargs):
    saver.save(path, {"model": {"x": array}}, {"n": 1}, **{"keep": Keep(), **kwargs})


def test_what_is_saved_is_what_there_was(tmp_path, gate):
    gate.opened.clear()
    with dt.comm.use(dt.comm.connect("local")) as comm:
        saver, array, values = Saver(comm), np.arange(6.0), {"list": [1]}
        saver.save(tmp_path, {"model": {"x": array}}, values, keep=Keep())
        array += 1  # training goes on
        values["list"].append(2)
        assert not checkpoint.exists(tmp_path)
        gate.opened.set()
        saver.wait()
    found = checkpoint.load(tmp_path)
    np.testing.assert_array_equal(found.tensors["model"]["x"], np.arange(6.0))
    assert found.values == {"list": [1]}


def test_a_second_save_waits_for_the_first(tmp_path, gate):
    gate.opened.clear()
    with dt.comm.use(dt.comm.connect("local")) as comm:
        saver = Saver(comm)
        save(saver, tmp_path, np.ones(3))
        threading.Timer(0.3, gate.opened.set).start()
        begin_s = time.monotonic()
        save(saver, tmp_path, np.zeros(3))
        assert storage(tmp_path).numbers().keys() >= {1}
        assert time.monotonic() - begin_s > 0.2
        saver.wait()
    assert sorted(storage(tmp_path).numbers()) == [1, 2]
    assert len(saver.stalls_s) == 2
    assert saver.stalls_s[1] > 0.2


def test_the_stall_is_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO, "disttrain")
    worlds.dense_net().fit(X, Y, epochs=1, verbose=0, callbacks=[dt.callbacks.BackupAndRestore(tmp_path)])
    assert f"checkpoint to {tmp_path}: training stood still for" in caplog.text
    assert "checkpoint-000001 written in" in caplog.text


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_rank_writes_a_part_where_all_see_the_directory(tmp_path, gate, world_size):
    tensors = {"model": {"a": np.arange(7.0), "b": np.float32(3)}, "optimizer": {"c": np.ones((3, 5), np.int8)}}

    def work(comm):
        saver = Saver(comm)
        for _ in range(2):
            saver.save(tmp_path, tensors, {"x": 1}, keep=Keep())
        saver.wait()

    threads.run(world_size, work)
    assert len(gate.writers) == 2 * world_size
    found = checkpoint.load(tmp_path)
    assert found.values == {"x": 1}
    for group, arrays in tensors.items():
        worlds.assert_equal({n: np.asarray(a) for n, a in arrays.items()}, found.tensors[group])
    files = {path.name for path in (tmp_path / "checkpoint-000002").iterdir()}
    assert {name.split(".")[1] for name in files if "safetensors" in name} == (
        {"safetensors"} if world_size == 1 else {str(rank) for rank in range(world_size)}
    )
    assert not [name for name in files if name.startswith("part")]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".tmp", ".seen"))]


def test_rank_0_writes_all_where_others_do_not_see_its_directory(tmp_path):
    def work(comm):
        saver = Saver(comm)
        save(saver, tmp_path / str(comm.rank), np.ones(4))
        saver.wait()

    threads.run(3, work)
    files = [path.name for path in (tmp_path / "0" / "checkpoint-000001").iterdir()]
    assert sorted(files) == ["manifest.json", "model.safetensors"]
    assert not (tmp_path / "1").exists()


@pytest.mark.parametrize("address", ["memory://{}/run", "file://{}"])
def test_so_it_is_behind_an_address(tmp_path, address):
    path = address.format(tmp_path)

    def work(comm):
        saver = Saver(comm)
        for k in range(4):
            save(saver, path, np.arange(5.0) + k)
        saver.wait()

    threads.run(3, work)
    found = checkpoint.load(path)
    np.testing.assert_array_equal(found.tensors["model"]["x"], np.arange(5.0) + 3)
    place = storage(path)
    assert list(place.numbers()) == [3, 4]
    assert place.leftovers() == []
    assert "model.2.safetensors" in str(entries(path, thoroughly=True)[-1].manifest)


class FailAt(dt.callbacks.Callback):
    """Has writing fail from a step on."""

    def __init__(self, gate, step):
        self.gate, self.step, self.steps = gate, step, 0

    def on_train_batch_end(self, batch, logs):
        self.steps += 1
        if self.steps == self.step:
            self.gate.error = OSError(5, "Input/output error")
        time.sleep(0.05)  # enough for a thread to fail


@pytest.mark.parametrize("world_size", [1, 3])
def test_an_error_of_writing_ends_the_training_at_the_next_step_on_all_ranks(tmp_path, gate, world_size):
    failing = []

    def work(comm):
        callback = FailAt(gate, 4)
        failing.append(callback)
        backup = dt.callbacks.BackupAndRestore(tmp_path, save_freq=4)
        worlds.dense_net().fit(X, Y, batch_size=5, epochs=50, verbose=0, callbacks=[callback, backup])

    kind, text = worlds.agreed(world_size, work)
    assert kind is CheckpointError
    assert f"{tmp_path}: a checkpoint of" in text
    assert "could not be written: Input/output error" in text
    assert all(callback.steps <= 8 for callback in failing)  # well before the next save would have met it
    assert not checkpoint.exists(tmp_path)


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_error_of_the_last_write_is_one_of_fit(tmp_path, gate, world_size):
    gate.error = OSError(28, "No space left on device")

    def work(comm):
        callbacks = [dt.callbacks.ModelCheckpoint(tmp_path)]
        worlds.dense_net().fit(X, Y, epochs=1, verbose=0, callbacks=callbacks)

    kind, text = worlds.agreed(world_size, work)
    assert kind is CheckpointError
    assert "No space left on device" in text


class ExpectedError(Exception):
    pass


class Raise(dt.callbacks.Callback):
    def __init__(self, gate):
        self.gate = gate

    def on_epoch_begin(self, epoch):
        if epoch == 1:
            threading.Timer(0.2, self.gate.opened.set).start()
            raise ExpectedError


def test_an_exception_waits_for_the_write_that_is_under_way(tmp_path, gate):
    gate.opened.clear()
    with pytest.raises(ExpectedError):
        worlds.dense_net().fit(
            X, Y, epochs=2, verbose=0, callbacks=[Raise(gate), dt.callbacks.BackupAndRestore(tmp_path)]
        )
    assert checkpoint.load(tmp_path).values["training"]["epoch"] == 1


def test_an_exception_says_that_the_write_failed_as_well(tmp_path, gate):
    gate.opened.clear()
    gate.error = OSError(5, "Input/output error")
    with pytest.raises(ExpectedError) as caught:
        worlds.dense_net().fit(
            X, Y, epochs=2, verbose=0, callbacks=[Raise(gate), dt.callbacks.BackupAndRestore(tmp_path)]
        )
    assert "besides, " in caught.value.__notes__[-1]
    assert "Input/output error" in caught.value.__notes__[-1]


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_cannot_be_saved_is_an_error_on_all_ranks_at_once(tmp_path, world_size):
    class Odd(dt.callbacks.Callback):
        def state(self):
            return {"x": {1, 2}}

    def work(comm):
        callbacks = [Odd(), dt.callbacks.BackupAndRestore(tmp_path)]
        worlds.dense_net().fit(X, Y, epochs=1, verbose=0, callbacks=callbacks)

    _, text = worlds.agreed(world_size, work)
    assert "a checkpoint holds numbers, texts, lists and dicts" in text


class Votes(dt.callbacks.Callback):
    def __init__(self, rank):
        self.rank, self.seen = rank, []

    def vote(self):
        return self.rank, 1

    def on_train_batch_end(self, batch, logs):
        self.seen.append(list(self.votes))


@pytest.mark.parametrize("world_size", [1, 3])
def test_votes_are_summed_over_the_ranks(world_size):
    def work(comm):
        callbacks = [Votes(comm.rank), dt.callbacks.Callback(), Votes(10 * comm.rank)]
        worlds.dense_net().fit(X, Y, batch_size=10, epochs=1, verbose=0, callbacks=callbacks)
        return callbacks[0].seen, callbacks[2].seen

    total = sum(range(world_size))
    for one, two in threads.run(world_size, work):
        assert one == [[total, world_size]] * 2
        assert two == [[10 * total, world_size]] * 2
