"""What a supervisor remembers of a `fit`: each step where that is cheap, all that it needs, nothing of another fit."""

import numpy as np
import pytest

import disttrain as dt
from disttrain import env, progress
from disttrain.errors import CheckpointError
from disttrain.last_step import LastStep
from disttrain.training import remembering

X = np.random.default_rng(0).normal(size=(40, 6))
STEPS = 5  # an epoch, of 8 samples each


class Killed(BaseException):
    """Nothing runs after it, as after a signal: not even what is saved when training fails."""


class Until(dt.callbacks.Callback):
    """Ends the run before step `stop`, counted over all fits of a script; notes the steps that were taken."""

    def __init__(self, stop=None, taken=None):
        self.stop = stop
        self.taken = [] if taken is None else taken

    def on_train_batch_begin(self, batch):
        if len(self.taken) == self.stop:
            raise Killed
        self.taken.append(self.model.optimizer.steps)


@pytest.fixture
def supervisor(monkeypatch):
    last = LastStep.make()
    if last is None:
        pytest.skip("this system has no memfd_create")
    monkeypatch.setenv(env.LAST_STEP, last.address)
    monkeypatch.setattr(remembering, "_SHARE", float("inf"))  # each step, whatever it costs
    yield last
    last.close()


def script(until, epochs=(3,), callbacks=(), optimizer="adam"):
    """Run a script that calls fit() so many times in a process of its own; return the last weights' digest."""
    progress._forget()
    dt.utils.set_random_seed(1)
    model = dt.Sequential([dt.layers.Dense(5, "relu", input_shape=(6,)), dt.layers.Dropout(0.3), dt.layers.Dense(2)])
    histories = []
    for number in epochs:
        model.compile(optimizer if isinstance(optimizer, str) else optimizer(), "mse", metrics=["mae"])
        history = model.fit(X, X[:, :2], 8, number, verbose=0, callbacks=[until, *callbacks], reproducible=True)
        histories.append(history.history)
    return dt.state_digest(model), histories


def every_optimizer():
    return dt.optimizers.Adam(0.01, gradient_accumulation_steps=3)


@pytest.fixture
def undisturbed(monkeypatch):
    """Return what a script yields that no supervisor remembers anything of."""

    def run(**how):
        with monkeypatch.context() as without:
            without.delenv(env.LAST_STEP, raising=False)
            return script(Until(), **how)

    return run


@pytest.mark.parametrize("stop", [0, 1, 4, 5, 7, 14])
def test_goes_on_at_the_step_that_was_not_finished(supervisor, undisturbed, stop):
    expected = undisturbed(optimizer=every_optimizer)
    with pytest.raises(Killed):
        script(Until(stop), optimizer=every_optimizer)
    again = Until()
    assert script(again, optimizer=every_optimizer) == expected
    assert again.taken == list(range(stop, 3 * STEPS))


def test_goes_on_again_and_again(supervisor, undisturbed):
    expected = undisturbed()
    taken = []
    for stop in (2, 3, 9):
        with pytest.raises(Killed):
            script(Until(stop, taken))
    assert script(Until(None, taken)) == expected
    assert taken == list(range(3 * STEPS))


def test_what_callbacks_hold_goes_on(supervisor, undisturbed):
    def best():
        return [dt.callbacks.EarlyStopping("loss", mode="max", restore_best_weights=True)]

    expected = undisturbed(callbacks=best())  # the loss falls: the best epoch, and its weights, are the first
    with pytest.raises(Killed):
        script(Until(STEPS + 2), callbacks=best())
    again = Until()
    assert script(again, callbacks=best()) == expected
    assert again.taken[0] == STEPS + 2


def test_of_several_fits_the_one_that_was_killed_goes_on(supervisor, undisturbed):
    expected = undisturbed(epochs=(1, 2, 1))
    with pytest.raises(Killed):
        script(Until(STEPS + 3), epochs=(1, 2, 1))
    again = Until()
    assert script(again, epochs=(1, 2, 1)) == expected
    # the first is done again, and leaves what the second has remembered
    assert again.taken == [*range(STEPS), *range(3, 2 * STEPS), *range(STEPS)]


def test_the_newer_of_memory_and_files_counts(supervisor, undisturbed, tmp_path, monkeypatch):
    def backup(path):
        return [dt.callbacks.BackupAndRestore(tmp_path / path, save_freq=4)]

    expected = undisturbed(callbacks=backup("other"))
    with pytest.raises(Killed):
        script(Until(6), callbacks=backup("saved"))
    again = Until(8)
    monkeypatch.setattr(remembering.Memory, "vote", lambda _: 0.0)  # from here on the files alone grow
    with pytest.raises(Killed):
        script(again, callbacks=backup("saved"))
    assert again.taken[0] == 6
    last = Until()
    assert script(last, callbacks=backup("saved")) == expected
    assert last.taken[0] == 12  # saved after each 4; steps 6 to 13 were taken


def test_costly_steps_are_left_out(supervisor, monkeypatch):
    """A write that takes 100 times as long as a step happens after each 5000th: here after the first three."""
    monkeypatch.setattr(remembering, "_SHARE", 0.02)
    written, clock = [], iter(range(10**9))
    monkeypatch.setattr(remembering.time, "monotonic", lambda: float(next(clock)))  # a second at each look
    keep = remembering.Memory.keep
    monkeypatch.setattr(
        remembering.Memory,
        "keep",
        lambda self, step, *rest: (written.append(step), keep(self, step, *rest[:2], -100.0)),
    )
    script(Until(), epochs=(4,))
    assert written == [1, 2, 3]


def test_another_batch_size_is_refused(supervisor):
    with pytest.raises(Killed):
        script(Until(3))
    progress._forget()
    model = dt.Sequential([dt.layers.Dense(2, input_shape=(6,))])
    model.compile("sgd", "mse")
    with pytest.raises(CheckpointError, match="the supervisor's memory was trained with batch_size 8, this run has 4"):
        model.fit(X, X[:, :2], 4, 1, verbose=0, callbacks=[Until()], reproducible=True)


def test_a_state_that_cannot_be_kept_is_told_and_training_goes_on(supervisor, undisturbed, caplog):
    class Strange(dt.callbacks.Callback):
        def state(self):
            return {"what": object()}

    expected = undisturbed(callbacks=[Strange()])
    assert script(Until(), callbacks=[Strange()]) == expected
    assert caplog.text.count("nothing more is remembered for a restart") == 1


def test_a_supervisor_out_of_reach_is_told(monkeypatch, undisturbed, caplog):
    monkeypatch.setenv(env.LAST_STEP, "1:0:1:disttrain-elsewhere")
    assert script(Until()) == undisturbed()
    assert caplog.text.count("the supervisor's memory is out of reach") == 1
