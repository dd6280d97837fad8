"""A run does not go on from what is not its own, nor from what is damaged, and says why on every rank."""

import logging

import numpy as np
import pytest

import disttrain as dt
from disttrain.errors import CheckpointDamagedError, CheckpointError
from tests.training import worlds

pytestmark = pytest.mark.timeout(30)


def fit(directory, *, samples=20, seed=0, callbacks=(), model=None, **kwargs):
    dt.utils.set_random_seed(seed)
    model = model or worlds.dense_net("adam", ["accuracy"])
    x, y = worlds.blobs(samples)
    arguments = {"batch_size": 7, "epochs": 2, "verbose": 0, **kwargs}
    return model, model.fit(x, y, callbacks=[*callbacks, dt.callbacks.BackupAndRestore(directory)], **arguments)


def stopping():
    return dt.callbacks.EarlyStopping("loss")


def net(units=5, optimizer="adam", metrics=("accuracy",), dtype=None):
    layers = [
        dt.layers.Dense(units, input_shape=(4,), dtype=dtype),
        dt.layers.Dropout(0.0),
        dt.layers.Dense(3, activation="softmax"),
    ]
    model = dt.Sequential(layers)
    model.compile(optimizer, "sparse_categorical_crossentropy", list(metrics))
    return {"model": model}


OTHERS = {
    "batch size": (lambda: {"batch_size": 8}, "was trained with batch_size 7, this run has 8"),
    "seed": (lambda: {"seed": 5}, "was trained with seed 0, this run has 5"),
    "data": (lambda: {"samples": 21}, "was trained with samples 20, this run has 21"),
    "order": (lambda: {"shuffle": False}, "was trained with shuffle True, this run has False"),
    "callbacks": (lambda: {"callbacks": [stopping()]}, r"callbacks \['History'.*this run has \['EarlyStopping'"),
    "metrics": (lambda: net(metrics=[]), r"metrics \['accuracy'\], this run has \[\]"),
    "shape": (lambda: net(units=6), r"model: 'dense/kernel' is float32 \(4, 5\) in the checkpoint, float32 \(4, 6\)"),
    "dtype": (lambda: net(dtype="float64"), r"'dense/kernel' is float32 \(4, 5\) in the checkpoint, float64 \(4, 5\)"),
    "optimizer": (lambda: net(optimizer="sgd"), "optimizer: 'dense/bias/momentum' does not match: the model has no"),
}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("what", OTHERS)
def test_a_run_that_differs_is_refused(tmp_path, what, world_size):
    other, text = OTHERS[what]
    fit(tmp_path)
    found = worlds.errors(world_size, lambda comm: fit(tmp_path, **other()))
    assert [type(error) for error in found] == [CheckpointError] * world_size
    for error in found:
        with pytest.raises(CheckpointError, match=text):
            raise error


def test_other_callbacks_of_the_same_number_are_refused(tmp_path):
    fit(tmp_path, callbacks=[stopping()])
    with pytest.raises(CheckpointError, match=r"callbacks \['EarlyStopping'.*this run has \['ModelCheckpoint'"):
        fit(tmp_path, callbacks=[dt.callbacks.ModelCheckpoint(tmp_path / "models")])


def test_callbacks_that_differ_on_one_rank_are_an_error_on_all(tmp_path):
    fit(tmp_path)
    found = worlds.errors(3, lambda comm: fit(tmp_path, callbacks=[stopping()] if comm.rank == 1 else []))
    assert [type(error) for error in found] == [CheckpointError] * 3
    assert "rank 1 of 3: " in str(found[0])


def test_a_saved_model_is_not_a_training(tmp_path):
    worlds.dense_net().save(tmp_path)
    kind, message = worlds.agreed(2, lambda comm: fit(tmp_path))
    assert kind is CheckpointError
    assert "holds a model, not the state of a training; load it with load()" in message


def damage(path, name="model.safetensors"):
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (path / name).write_bytes(content)


def test_a_damaged_backup_is_named_and_the_one_before_it_goes_on(tmp_path, caplog):
    _, course = fit(tmp_path, epochs=3)
    damage(tmp_path / "checkpoint-000003")

    def again(comm):
        model, history = fit(tmp_path, epochs=3)
        return model.optimizer.iterations, history.history, dt.state_digest(model)

    with caplog.at_level(logging.INFO, logger="disttrain"):
        results = dt.comm.threads.run(2, again)
    assert [r[0] for r in results] == [9, 9]
    # the third epoch was trained again, on two ranks: float32 sums in another order
    assert results[0][1]["loss"][:2] == course.history["loss"][:2]
    np.testing.assert_allclose(results[0][1]["loss"], course.history["loss"], rtol=1e-5)
    warnings = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 2  # rank 0 alone reads, and then sets it aside
    assert all("checkpoint-000003: model.safetensors: its SHA-256 is" in warning for warning in warnings)
    assert "resumed from" in caplog.text
    assert "checkpoint-000002: epoch 2, step 0" in caplog.text


def test_nothing_but_damaged_backups_is_an_error_on_all_ranks(tmp_path):
    fit(tmp_path)
    for number in (1, 2):
        damage(tmp_path / f"checkpoint-00000{number}", "optimizer.safetensors")
    kind, message = worlds.agreed(3, lambda comm: fit(tmp_path))
    assert kind is CheckpointDamagedError
    assert "none of 2 checkpoints" in message
    assert message.count("optimizer.safetensors: its SHA-256") == 2


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_backup_that_cannot_be_written_is_an_error_on_all_ranks(tmp_path, world_size):
    (tmp_path / "file").write_text("not a directory")
    kind, message = worlds.agreed(world_size, lambda comm: fit(tmp_path / "file" / "run"))
    assert kind is CheckpointError
    assert str(tmp_path / "file") in message


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_model_that_cannot_be_saved_is_an_error_on_all_ranks(tmp_path, world_size):
    (tmp_path / "file").write_text("not a directory")
    kind, message = worlds.agreed(world_size, lambda comm: worlds.dense_net().save(tmp_path / "file"))
    assert kind is CheckpointError
    assert str(tmp_path / "file") in message


def test_a_loss_of_validation_that_is_not_finite_can_be_saved(tmp_path):
    bad = (np.full((3, 4), np.nan), np.zeros(3, int))
    _, first = fit(tmp_path, validation_data=bad, callbacks=[dt.callbacks.EarlyStopping(patience=9)])
    _, again = fit(tmp_path, validation_data=bad, callbacks=[dt.callbacks.EarlyStopping(patience=9)])
    np.testing.assert_equal(again.history, first.history)
    assert np.isnan(first.history["val_loss"]).all()
