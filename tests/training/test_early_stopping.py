"""EarlyStopping follows the rules of Keras 3, which are written out here."""

import itertools
import logging

import numpy as np
import pytest

import disttrain as dt
from tests.training import worlds

COURSES = [
    [3, 2, 1, 2, 2, 2, 0.5],
    [1, 1, 1, 1, 1, 1, 1],
    [5, 4, 4.5, 3.9, 3.95, 3.9, 3.89],
    [1, 2, 3, 4, 5, 6, 7],
    [0.2, 0.5, 0.4, 0.6, 0.7, 0.65, 0.66],
    [4, 1, 3, 2, 1.5, 0.9, 5],
]


def keras(course, *, min_delta, patience, baseline, maximize, start_from_epoch):
    """Return the epoch after which Keras 3 stops (None: it does not) and its best epoch.

    Source: keras/src/callbacks/early_stopping.py and monitor_callback.py.
    """
    greater = (lambda a, b: a > b) if maximize else (lambda a, b: a < b)
    delta = abs(min_delta) * (1 if maximize else -1)
    best, best_epoch, wait = None, 0, 0

    def is_improvement(value, reference):
        return reference is None or greater(value - delta, reference)

    for epoch, current in enumerate(course):
        if epoch < start_from_epoch:
            continue
        wait += 1
        if is_improvement(current, best):
            best, best_epoch = current, epoch
            if baseline is None or is_improvement(current, baseline):
                wait = 0
            continue
        if wait >= patience and epoch > 0:
            return epoch, best_epoch
    return None, best_epoch


class FakeModel:
    """Weights that tell the epoch in which they were."""

    def __init__(self):
        self.stop_training = False
        self.weights = [dt.Tensor(np.zeros(2), name="w")]


def ours(course, *, maximize, **kwargs):
    mode = "max" if maximize else "min"
    stopping = dt.callbacks.EarlyStopping("value", mode=mode, restore_best_weights=True, **kwargs)
    stopping.model = FakeModel()
    stopping.on_train_begin()
    for epoch, value in enumerate(course):
        stopping.model.weights[0].data[...] = epoch
        stopping.on_epoch_end(epoch, {"value": value})
        if stopping.model.stop_training:
            break
    stopping.on_train_end()
    stopped = epoch if stopping.model.stop_training else None
    return stopped, stopping.best_epoch, float(stopping.model.weights[0].data[0]), stopping


@pytest.mark.parametrize("course", COURSES)
@pytest.mark.parametrize("maximize", [False, True])
def test_it_stops_when_keras_stops_and_restores_what_keras_restores(course, maximize):
    outcomes = set()
    choices = itertools.product([0, 0.1, -0.1, 1.5], [0, 1, 2, 3], [None, 0.45, 3.92], [0, 2])
    for min_delta, patience, baseline, start in choices:
        rules = {"min_delta": min_delta, "patience": patience, "baseline": baseline, "start_from_epoch": start}
        stopped, best_epoch, weights, _ = ours(course, maximize=maximize, **rules)
        assert (stopped, best_epoch) == keras(course, maximize=maximize, **rules), rules
        assert weights == best_epoch, rules
        outcomes.add(stopped)
    assert len(outcomes) > 1  # the cases do differ


@pytest.mark.parametrize(
    ("monitor", "maximize"),
    [("val_loss", False), ("loss", False), ("mse", False), ("val_accuracy", True), ("accuracy", True), ("acc", True),
     ("val_precision", True), ("recall", True), ("f1_score", True), ("sparse_categorical_accuracy", True)],
)  # fmt: skip
def test_auto_knows_which_way_is_better(monitor, maximize):
    stopping = dt.callbacks.EarlyStopping(monitor)
    stopping.model = FakeModel()
    stopping.on_train_begin()
    stopping.on_epoch_end(0, {monitor: 0.5})
    stopping.on_epoch_end(1, {monitor: 0.6})
    assert stopping.model.stop_training == (not maximize)


def test_without_restoring_the_last_weights_stay():
    x, y = worlds.blobs()
    with_, without = worlds.dense_net(dt.optimizers.SGD(-0.0)), worlds.dense_net(dt.optimizers.SGD(0.5))
    stopping = dt.callbacks.EarlyStopping("loss", mode="max", patience=1, restore_best_weights=True)
    start = worlds.weights(without)
    history = without.fit(
        x, y, epochs=9, verbose=0, callbacks=[dt.callbacks.EarlyStopping("loss", mode="max", patience=1)]
    )
    assert history.epoch == [0, 1]  # the loss falls, so that the first epoch remains the best
    restored = worlds.dense_net(dt.optimizers.SGD(0.5))
    restored.fit(x, y, epochs=9, verbose=0, callbacks=[stopping])
    once = worlds.dense_net(dt.optimizers.SGD(0.5))
    once.fit(x, y, epochs=1, verbose=0)
    assert dt.state_digest(restored) == dt.state_digest(once)
    assert dt.state_digest(without) != dt.state_digest(once)
    worlds.assert_equal(worlds.weights(with_), start)


@pytest.mark.timeout(30)
def test_all_ranks_stop_and_restore_alike():
    x, y = worlds.digits(24)

    def fit(comm):
        model = worlds.conv_net(dt.optimizers.SGD(0.2))
        stopping = dt.callbacks.EarlyStopping("val_loss", patience=1, restore_best_weights=True)
        history = model.fit(
            x, y, batch_size=10, epochs=30, verbose=0, validation_data=(x[:9], y[:9] * 0), callbacks=[stopping]
        )  # fmt: skip
        return history.history["val_loss"], stopping.best_epoch, dt.state_digest(model)

    results = dt.comm.threads.run(3, fit)
    assert results[1:] == results[:1] * 2
    course, best_epoch, _ = results[0]
    assert len(course) < 30
    assert best_epoch == int(np.argmin(course))


def test_it_says_why_it_stopped(caplog):
    with caplog.at_level(logging.INFO, logger="disttrain"):
        *_, stopping = ours([1, 2, 2], maximize=False, patience=2, verbose=1)
    assert stopping.stopped_epoch == 2
    assert "early stopping after epoch 3: the best value, 1.0, was in epoch 1" in caplog.text


def test_a_second_training_begins_anew():
    *_, stopping = ours([1, 2, 2], maximize=False, patience=2)
    stopping.on_train_begin()
    assert (stopping.wait, stopping.best, stopping.best_epoch, stopping.stopped_epoch) == (0, None, 0, 0)
    stopping.on_epoch_end(0, {"value": 100.0})
    assert stopping.best == 100.0
