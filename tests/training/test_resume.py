"""A run that was interrupted and goes on ends with the bits of one that was not."""

import functools

import numpy as np
import pytest

import disttrain as dt
from disttrain.comm import threads
from tests.training import worlds

pytestmark = pytest.mark.timeout(60)

EPOCHS, SAMPLES, BATCH = 2, 22, 8
STEPS_PER_EPOCH = 3
STEPS = EPOCHS * STEPS_PER_EPOCH
EVENTS = [("step", k) for k in range(1, STEPS + 1)] + [("epoch", k) for k in range(EPOCHS)]


class InterruptedError(Exception):  # noqa: A001
    pass


class Interrupt(dt.callbacks.Callback):
    """Raises once, on all ranks, at one event; before the state of that event is saved."""

    def __init__(self, event):
        self.event = event
        self.steps = 0

    def on_train_batch_end(self, batch, logs):
        self.meet("step", self.model.optimizer.iterations)
        self.steps += 1

    def on_epoch_end(self, epoch, logs):
        self.meet("epoch", epoch)

    def meet(self, kind, number):
        if self.event == (kind, number):
            self.event = None
            raise InterruptedError


def fit(directory, save_freq, interrupt, *, epochs=EPOCHS, floatx="float32"):
    """Train, in a process that has just started: a new model, new callbacks. Return all that must be equal."""
    x, y = worlds.digits(SAMPLES)
    model = worlds.conv_net("adam", ["accuracy", "f1_score"])
    stopping = dt.callbacks.EarlyStopping("loss", mode="max", patience=5, restore_best_weights=True)
    callbacks = [interrupt, stopping]
    if directory is not None:
        callbacks.append(dt.callbacks.BackupAndRestore(directory, save_freq=save_freq))
    history = model.fit(
        x, y, BATCH, epochs, verbose=0, callbacks=callbacks, validation_data=worlds.digits(9, start=50)
    )  # fmt: skip
    return {
        "digest": dt.state_digest(model),
        "optimizer": [slot.copy() for slots in model.optimizer.slots for slot in slots.values()],
        "iterations": model.optimizer.iterations,
        "history": history.history,
        "epoch": history.epoch,
        "evaluate": model.evaluate(x, y),
        "best": (stopping.best, stopping.best_epoch),
    }


def assert_same(ours, theirs):
    np.testing.assert_equal(ours, theirs)  # arrays too, to the bit
    for values, others in zip(ours["history"].values(), theirs["history"].values(), strict=True):
        assert [type(value) for value in values] == [type(value) for value in others]


@functools.cache
def undisturbed(world_size):
    return threads.run(world_size, lambda comm: fit(None, None, Interrupt(None)))


def interrupted(world_size, directory, save_freq, event):
    """Return what the second of two runs ends with, and the number of steps that it took."""

    def twice(comm):
        with pytest.raises(InterruptedError):
            fit(directory, save_freq, Interrupt(event))
        comm.barrier()
        interrupt = Interrupt(None)
        return fit(directory, save_freq, interrupt), interrupt.steps

    return threads.run(world_size, twice)


@pytest.mark.parametrize("save_freq", ["epoch", 1, 2, 3])
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: f"{event[0]}-{event[1]}")
def test_a_run_resumed_after_any_step_ends_with_the_same_bits(tmp_path, save_freq, event):
    ((result, steps),) = interrupted(1, tmp_path, save_freq, event)
    assert_same(result, undisturbed(1)[0])
    # and did not begin anew: what had been saved was not done again
    kind, number = event
    done = number - 1 if kind == "step" else (number + 1) * STEPS_PER_EPOCH
    every = STEPS_PER_EPOCH if save_freq == "epoch" else save_freq
    saved = done // every * every
    if save_freq == "epoch" and kind == "epoch":
        saved -= STEPS_PER_EPOCH  # it was interrupted just before
    assert steps == STEPS - saved


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    ("save_freq", "event"), [("epoch", ("step", 5)), (2, ("step", 4)), (3, ("epoch", 1)), (1, ("step", 6))]
)
def test_so_does_one_on_several_ranks(tmp_path, world_size, save_freq, event):
    for (result, _), theirs in zip(
        interrupted(world_size, tmp_path, save_freq, event), undisturbed(world_size), strict=True
    ):
        assert_same(result, theirs)


def test_a_run_that_is_interrupted_again_and_again_ends_with_the_same_bits(tmp_path):
    for event in EVENTS[:STEPS]:
        with pytest.raises(InterruptedError):
            fit(tmp_path, 1, Interrupt(event))
    assert_same(fit(tmp_path, 1, Interrupt(None)), undisturbed(1)[0])


def test_saving_does_not_change_a_run(tmp_path):
    assert_same(fit(tmp_path, 2, Interrupt(None)), undisturbed(1)[0])


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_finished_run_does_nothing_and_returns_its_history(tmp_path, world_size):
    def twice(comm):
        first, interrupt = fit(tmp_path, "epoch", Interrupt(None)), Interrupt(None)
        return first, fit(tmp_path, "epoch", interrupt), interrupt.steps

    for first, second, steps in threads.run(world_size, twice):
        assert_same(second, first)
        assert steps == 0


def test_a_finished_run_goes_on_to_more_epochs(tmp_path):
    fit(tmp_path, "epoch", Interrupt(None), epochs=1)
    assert_same(fit(tmp_path, "epoch", Interrupt(None)), undisturbed(1)[0])


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 3)])
def test_another_number_of_ranks_goes_on_to_the_same_up_to_rounding(tmp_path, float64, before, after):
    def first(comm):
        with pytest.raises(InterruptedError):
            fit(tmp_path, 2, Interrupt(("step", 6)))

    threads.run(before, first)
    results = threads.run(after, lambda comm: fit(tmp_path, 2, Interrupt(None)))
    reference = worlds.alone(lambda comm: fit(None, None, Interrupt(None)))
    for result in results:
        assert result["digest"] == results[0]["digest"]
        # 1e-10: as in test_any_number_of_workers
        for name, values in result["history"].items():
            np.testing.assert_allclose(values, reference["history"][name], rtol=1e-10)
        np.testing.assert_allclose(result["evaluate"][0], reference["evaluate"][0], rtol=1e-10)


@pytest.mark.parametrize("world_size", [1, 3])
def test_early_stopping_goes_on_counting(tmp_path, world_size):
    # wrong labels to validate on: the loss rises from the first epoch, and patience ends after the interruption
    x, y = worlds.blobs()

    def run(comm, directory, event):
        model = worlds.dense_net("adam", dropout=0.3)
        stopping = dt.callbacks.EarlyStopping(patience=4, restore_best_weights=True)
        callbacks = [Interrupt(event), stopping, dt.callbacks.BackupAndRestore(directory)]
        history = model.fit(
            x, y, epochs=40, verbose=0, validation_data=(x, (y + 1) % 3), callbacks=callbacks
        )  # fmt: skip
        return history.history, history.epoch, dt.state_digest(model), stopping.best_epoch, stopping.best

    whole = threads.run(world_size, run, tmp_path / "whole", None)
    with pytest.raises(InterruptedError):
        threads.run(world_size, run, tmp_path / "parts", ("epoch", 3))
    parts = threads.run(world_size, run, tmp_path / "parts", None)
    again = threads.run(world_size, run, tmp_path / "parts", None)
    assert parts == whole
    assert again == whole  # it had stopped, and stays so
    assert 4 < len(whole[0][1]) < 40
