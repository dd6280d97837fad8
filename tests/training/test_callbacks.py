"""Callbacks: when they are called, and what they are told; ModelCheckpoint."""

import numpy as np
import pytest

import disttrain as dt
from tests.training import worlds

pytestmark = pytest.mark.timeout(30)

X, Y = worlds.blobs(20)


class Recorder(dt.callbacks.Callback):
    def __init__(self, events, name):
        self.events, self.name = events, name

    def on_train_begin(self):
        self.events.append((self.name, "train begin"))

    def on_epoch_begin(self, epoch):
        self.events.append((self.name, "epoch begin", epoch))

    def on_train_batch_end(self, batch, logs):
        self.events.append((self.name, "step", batch, sorted(logs)))

    def on_epoch_end(self, epoch, logs):
        self.events.append((self.name, "epoch end", epoch, sorted(logs)))

    def on_train_end(self):
        self.events.append((self.name, "train end"))


def test_events_come_in_order_to_one_callback_after_the_other():
    events = []
    model = worlds.dense_net(metrics=["accuracy"])
    callbacks = [Recorder(events, "a"), Recorder(events, "b")]
    model.fit(X, Y, batch_size=12, epochs=2, verbose=0, validation_data=(X, Y), callbacks=callbacks)
    step, end = ["accuracy", "loss"], ["accuracy", "loss", "val_accuracy", "val_loss"]
    expected = [("train begin",)]
    for epoch in range(2):
        expected += [("epoch begin", epoch), ("step", 0, step), ("step", 1, step), ("epoch end", epoch, end)]
    expected += [("train end",)]
    assert events == [(name, *event) for event in expected for name in ("a", "b")]
    assert callbacks[0].model is model


class Values(dt.callbacks.Callback):
    def __init__(self):
        self.steps, self.epochs = [], []

    def on_train_batch_end(self, batch, logs):
        self.steps.append(logs["loss"])

    def on_epoch_end(self, epoch, logs):
        self.epochs.append(logs["loss"])


def test_a_step_is_told_the_mean_of_its_epoch_so_far(float64):
    values, single = Values(), worlds.dense_net()
    model = worlds.dense_net()
    history = model.fit(X, Y, batch_size=8, epochs=2, shuffle=False, verbose=0, callbacks=[values])
    parts = [slice(0, 8), slice(8, 16), slice(16, 20)]
    expected = []
    for _ in range(2):
        losses = []
        for part in parts:
            losses += [single.train_on_batch(X[part], Y[part])["loss"]] * len(X[part])
            expected.append(np.mean(losses))
    assert values.steps == pytest.approx(expected, rel=1e-13)
    assert values.epochs == history.history["loss"] == [values.steps[2], values.steps[5]]


@pytest.mark.parametrize("world_size", [1, 3])
def test_stop_training_ends_it_after_the_epoch(world_size):
    class Stop(dt.callbacks.Callback):
        def on_train_batch_end(self, batch, logs):
            self.model.stop_training = True

    def fit(comm):
        events = []
        model = worlds.dense_net()
        model.fit(X, Y, batch_size=12, epochs=5, verbose=0, callbacks=[Stop(), Recorder(events, "")])
        again = model.fit(X, Y, epochs=2, verbose=0).epoch  # not for ever
        return [event[1] for event in events], again

    for events, again in dt.comm.threads.run(world_size, fit):
        assert events == ["train begin", "epoch begin", "step", "step", "epoch end", "train end"]
        assert again == [0, 1]


def test_a_callback_may_put_values_of_its_own_into_the_history():
    class Rate(dt.callbacks.Callback):
        def on_epoch_end(self, epoch, logs):
            logs["rate"] = 1 / (epoch + 1)

    history = worlds.dense_net().fit(X, Y, epochs=2, verbose=0, callbacks=[Rate()]).history
    assert history["rate"] == [1, 0.5]  # as Keras's LearningRateScheduler does


def checkpoints(path):
    return sorted(entry.name for entry in path.iterdir() if entry.name.startswith("checkpoint-"))


@pytest.mark.parametrize("world_size", [1, 2])
def test_model_checkpoint_saves_after_each_epoch(tmp_path, world_size):
    def fit(comm):
        model = worlds.dense_net("adam")
        model.fit(X, Y, epochs=3, verbose=0, callbacks=[dt.callbacks.ModelCheckpoint(tmp_path)])
        return dt.state_digest(model)

    digest = dt.comm.threads.run(world_size, fit)[0]
    assert checkpoints(tmp_path) == ["checkpoint-000002", "checkpoint-000003"]
    assert dt.state_digest(dt.load_model(tmp_path)) == digest


def test_model_checkpoint_saves_after_a_number_of_steps(tmp_path):
    saved = []

    class Watched(dt.callbacks.ModelCheckpoint):
        def _save(self, logs):
            saved.append(self.model.optimizer.iterations)
            super()._save(logs)

    model = worlds.dense_net("adam")
    model.fit(X, Y, batch_size=5, epochs=3, verbose=0, callbacks=[Watched(tmp_path, save_freq=5)])
    assert saved == [5, 10]
    assert dt.load_model(tmp_path).optimizer.iterations == 10


@pytest.mark.parametrize(
    ("mode", "monitor", "kept"), [("min", "value", 3), ("max", "value", 1), ("auto", "accuracy", 1)]
)
def test_model_checkpoint_keeps_the_best(tmp_path, mode, monitor, kept):
    class Values(dt.callbacks.Callback):
        def on_epoch_end(self, epoch, logs):
            self.model.weights[1].data[...] = epoch
            logs[monitor] = [0.5, 0.9, 0.5, 0.1, 0.2][epoch]

    callback = dt.callbacks.ModelCheckpoint(tmp_path, monitor, save_best_only=True, mode=mode)
    worlds.dense_net(metrics=["accuracy"]).fit(X, Y, epochs=5, verbose=0, callbacks=[Values(), callback])
    assert (dt.load_model(tmp_path).weights[1].data == kept).all()


def test_model_checkpoint_and_early_stopping_agree_on_the_best(tmp_path):
    model = worlds.dense_net(dt.optimizers.SGD(0.5))
    callbacks = [
        dt.callbacks.EarlyStopping(patience=2, restore_best_weights=True),
        dt.callbacks.ModelCheckpoint(tmp_path, save_best_only=True),
    ]
    # to validate on wrong labels is to see the loss rise
    wrong = (X, (Y + 1) % 3)
    course = model.fit(X, Y, epochs=9, verbose=0, validation_data=wrong, callbacks=callbacks).history["val_loss"]
    assert int(np.argmin(course)) < len(course) - 1
    assert dt.state_digest(dt.load_model(tmp_path)) == dt.state_digest(model)
