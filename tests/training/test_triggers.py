"""When checkpoints are saved, and which stay: steps, epochs, seconds, the best, signals, the end of the job's time."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

import disttrain as dt
from disttrain import checkpoint
from disttrain.checkpoint import Keep
from disttrain.checkpoint.inspection import entries
from disttrain.comm import threads
from disttrain.errors import PREEMPTED, CheckpointError, ConfigError, Preempted
from tests.training import worlds

pytestmark = pytest.mark.timeout(90)

X, Y = worlds.blobs(20)


def fit(callbacks, *, epochs=1, batch_size=5, seed=None):
    model = worlds.dense_net("adam", ["accuracy"])
    model.fit(X, Y, batch_size=batch_size, epochs=epochs, verbose=0, callbacks=callbacks)
    return model


def saved(path):
    """Return the steps after which what lies in `path` was saved."""
    values = [entry.manifest.values for entry in entries(path, thoroughly=True) if entry.is_whole]
    return [v.get("training", v)["iterations"] for v in values]


class Clock:
    """A clock that advances by a second with each step, differently on each rank."""

    def __init__(self, monkeypatch):
        self.now_s = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now_s)


class Tick(dt.callbacks.Callback):
    def __init__(self, clock):
        self.clock = clock

    def on_train_batch_begin(self, batch):
        self.clock.now_s += 1


@pytest.mark.parametrize("kind", [dt.callbacks.BackupAndRestore, dt.callbacks.ModelCheckpoint])
def test_saving_after_seconds_follows_a_clock_that_is_never_set(tmp_path, monkeypatch, kind):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(time, "time", lambda: 0.0)  # of the wall, set back to 1970
    callback = kind(tmp_path, save_freq=1000, seconds=3, keep=99)
    fit([Tick(clock), callback], epochs=3)
    # the clock is asked before a step
    expected = [3, 6, 9, 12]
    assert saved(tmp_path) == expected


@pytest.mark.parametrize("world_size", [1, 3])
def test_ranks_save_together_when_the_clock_of_the_first_says_so(tmp_path, world_size):
    def work(comm):
        callback = dt.callbacks.BackupAndRestore(tmp_path, save_freq=1000, seconds=1e-9, keep=99)
        fit([callback], epochs=1)

    threads.run(world_size, work)
    assert saved(tmp_path) == [1, 2, 3, 4]


def test_the_end_of_fit_is_saved(tmp_path):
    fit([dt.callbacks.BackupAndRestore(tmp_path, save_freq=3, keep=9)])
    assert saved(tmp_path) == [3, 4]


class Value(dt.callbacks.Callback):
    def __init__(self, values):
        self.values = values

    def on_epoch_end(self, epoch, logs):
        logs["value"] = self.values[epoch]


NAN = float("nan")


@pytest.mark.parametrize(
    ("keep", "mode", "left"),
    [
        (1, "max", [8]),
        (Keep(last=3), "max", [6, 7, 8]),
        (Keep(last=1, best=2), "max", [2, 7, 8]),
        (Keep(last=1, best=2), "min", [3, 5, 8]),
        (Keep(last=1, every=3), "max", [3, 6, 8]),
        (Keep(last=2, best=1, every=4), "min", [4, 5, 7, 8]),
    ],
)
@pytest.mark.parametrize("kind", [dt.callbacks.BackupAndRestore, dt.callbacks.ModelCheckpoint])
def test_the_newest_the_best_and_every_nth_stay(tmp_path, kind, keep, mode, left):
    values = [5.0, 9.0, 2.0, 5.0, 1.0, NAN, 8.0, 5.0]
    callbacks = [Value(values), kind(tmp_path, keep=keep, monitor="value", mode=mode)]
    fit(callbacks, epochs=8, batch_size=20)
    names = [entry.name for entry in entries(tmp_path, thoroughly=True)]
    assert names == [f"checkpoint-{number:06d}" for number in left]


@pytest.mark.parametrize("arguments", [{"last": 0}, {"best": -1}, {"every": 0.5}, {"last": True}])
def test_what_can_not_be_kept_is_refused(arguments):
    with pytest.raises(ConfigError, match="must be an integer of at least"):
        Keep(**arguments)


@pytest.mark.parametrize("arguments", [{"save_freq": 0}, {"save_freq": "step"}, {"seconds": 0}, {"save_freq": True}])
def test_what_is_no_time_is_refused(tmp_path, arguments):
    with pytest.raises(ConfigError, match=r"save_freq is|seconds is"):
        dt.callbacks.BackupAndRestore(tmp_path, **arguments)


def test_training_ends_before_the_time_limit_and_goes_on_later(tmp_path, monkeypatch):
    whole = dt.state_digest(fit([Tick(Clock(monkeypatch))], epochs=20))
    clock, ends = Clock(monkeypatch), []

    def go_on():
        # 40 seconds, of which the last 30 are for the end of the program: by this clock about ten steps at a time
        backup = dt.callbacks.BackupAndRestore(tmp_path, save_freq=1000, time_limit_s=40)
        return dt.state_digest(fit([Tick(clock), backup], epochs=20))

    while len(ends) < 7:
        with pytest.raises(Preempted) as caught:
            go_on()
        assert caught.value.code == PREEMPTED
        assert caught.value.reason == "rank 0: the time limit of the job is near"
        ends += saved(tmp_path)[-1:]
    assert go_on() == whole
    assert ends == sorted(set(ends))


def test_slurm_says_when_the_job_ends(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 20))
    with pytest.raises(Preempted):
        fit([dt.callbacks.BackupAndRestore(tmp_path)])
    assert saved(tmp_path) == [1]


@pytest.mark.parametrize("world_size", [2, 3])
def test_one_rank_is_enough_to_end_all(tmp_path, world_size):
    def work(comm):
        limit = 1 if comm.rank == 1 else None
        with pytest.raises(Preempted) as caught:
            fit([dt.callbacks.BackupAndRestore(tmp_path, time_limit_s=limit)])
        return caught.value.reason

    reasons = threads.run(world_size, work)
    assert reasons == ["rank 1: the time limit of the job is near"] * world_size
    assert saved(tmp_path) == [1]


SCRIPT = """
import os, time
import numpy as np
import disttrain as dt

class Slow(dt.callbacks.Callback):
    def on_train_batch_end(self, batch, logs):
        time.sleep(0.02)
        if self.model.optimizer.iterations == 5:
            open("ready", "w").write(str(os.getpid()))

x = np.random.default_rng(0).normal(size=(40, 4))
model = dt.Sequential([dt.layers.Dense(3, input_shape=(4,))])
model.compile("adam", "mse")
try:
    model.fit(x, x[:, :3], 4, 400, verbose=0, callbacks=[Slow(), dt.callbacks.BackupAndRestore("saved")])
finally:
    print("steps", model.optimizer.iterations, flush=True)
"""


@contextlib.contextmanager
def started(folder):
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        await_file(folder / "ready")
        yield process
    finally:
        process.kill()
        process.communicate()


def await_file(path):
    end_s = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end_s
        time.sleep(0.005)


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGUSR1], [signal.SIGTERM, signal.SIGUSR1] * 3])
def test_a_signal_ends_training_after_the_step_with_all_of_it_saved(tmp_path, numbers):
    with started(tmp_path) as process:
        for number in numbers:
            process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == PREEMPTED, err
    steps = int(out.split()[-1])
    assert steps >= 5
    assert saved(tmp_path / "saved")[-1] == steps  # nothing is lost
    assert "received SIG" in err


def test_signals_are_as_they_were_after_fit(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    fit([dt.callbacks.BackupAndRestore(tmp_path)])
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_comes_too_late_is_sent_again(tmp_path):
    received = []
    before = signal.signal(signal.SIGUSR1, lambda *_: received.append(1))

    class Late(dt.callbacks.Callback):
        def on_epoch_end(self, epoch, logs):
            os.kill(os.getpid(), signal.SIGUSR1)

    try:
        fit([Late(), dt.callbacks.BackupAndRestore(tmp_path)])
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert received == [1]


def test_a_second_run_in_the_same_directory_is_refused_by_name(tmp_path):
    with started(tmp_path) as process:
        refusal = f"belongs to a run that goes on: process {process.pid} on host"
        with pytest.raises(CheckpointError, match=refusal):
            fit([dt.callbacks.BackupAndRestore(tmp_path / "saved")])
    # killed, it holds nothing any more
    with pytest.raises(CheckpointError, match="was trained with"):
        fit([dt.callbacks.BackupAndRestore(tmp_path / "saved")])


def test_a_run_that_goes_on_past_a_damaged_checkpoint_keeps_two_whole_ones(tmp_path, caplog):
    """Else the damaged one would count as one of the newest, and the one that the run went on from would go for it."""

    class Look(dt.callbacks.Callback):
        def on_train_begin(self):
            self.seen = []

        def on_train_batch_begin(self, batch):
            self.model.current_fit.saver.wait()
            self.seen.append(saved(tmp_path) if checkpoint.exists(tmp_path) else [])

    fit([Look(), dt.callbacks.BackupAndRestore(tmp_path, save_freq=1)])
    assert saved(tmp_path) == [3, 4]
    (tmp_path / "checkpoint-000004" / "model.safetensors").write_bytes(b"")
    look = Look()
    fit([look, dt.callbacks.BackupAndRestore(tmp_path, save_freq=1)], epochs=2)
    assert look.seen[:3] == [[3], [3, 4], [4, 5]]
    assert (tmp_path / "damaged-checkpoint-000004").is_dir()
    assert "checkpoint-000004: damaged, set aside as damaged-checkpoint-000004" in caplog.text


def test_a_run_that_was_taken_over_writes_nothing_more(tmp_path, monkeypatch):
    # as where a lock was lost: a host that others believed dead
    first = checkpoint.storage(tmp_path).claim()
    first.release()
    second = checkpoint.storage(tmp_path).claim()
    pieces = checkpoint.whole({"model": {}})
    checkpoint.write(checkpoint.storage(tmp_path), pieces, 2, keep=Keep(), claim=second)
    with pytest.raises(CheckpointError, match=r"process \d+ on host .* has taken this directory over"):
        checkpoint.write(checkpoint.storage(tmp_path), pieces, 1, keep=Keep(), claim=first)
    assert checkpoint.load(tmp_path).values == 2
    second.release()
    assert list(checkpoint.storage(tmp_path).numbers()) == [1]
    assert not checkpoint.storage(tmp_path).leftovers()


def test_so_does_one_that_is_taken_over_while_it_writes(tmp_path):
    place = checkpoint.storage(tmp_path)
    first, make_draft = place.claim(), place.make_draft
    first.release()

    def taken_over(token, name):
        (tmp_path / ".run.json").write_text('{"generation": 2, "host": "other", "pid": 7, "since": "now"}')
        return make_draft(token, name)

    place.make_draft = taken_over
    with pytest.raises(CheckpointError, match="process 7 on host other, since now has taken this directory over"):
        checkpoint.write(place, checkpoint.whole({"model": {}}), 1, keep=Keep(), claim=first)
    assert not checkpoint.exists(tmp_path)
    assert not place.leftovers()
