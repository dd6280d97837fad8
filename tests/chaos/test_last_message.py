"""Whatever message a rank does not live to send, the others go on to the same bits, or end with DeadRankError."""

import functools
import itertools

import numpy as np
import pytest

import disttrain as dt
from disttrain.errors import DeadRankError
from tests.chaos import mortal

EPOCHS = 2
EVERY = 61  # message before which a rank dies, in the short form; not a multiple of what a step sends


class Note(dt.callbacks.Callback):
    """Counts, in a state of its own; the highest rank dies in the third of its calls that are named `dies_in`.

    All communicate in all calls then.
    """

    def __init__(self, comm, dies_in):
        self.comm = comm
        self.dies_in = dies_in
        self.dies_at = 3 if comm.rank == comm.world_size - 1 else 0
        self.steps = self.epochs = 0
        self.seen = []  # the steps of which it has heard here

    def on_train_batch_begin(self, batch):
        self.communicate("on_train_batch_begin")

    def on_train_batch_end(self, batch, logs):
        self.communicate("on_train_batch_end")
        self.steps += 1
        self.seen.append(self.model.optimizer.steps)

    def on_epoch_end(self, epoch, logs):
        self.epochs += 1

    def communicate(self, event):
        if event == self.dies_in:
            self.dies_at -= 1
            if self.dies_at == 0:
                self.comm.die()
        if self.dies_in:
            self.comm.barrier()

    def state(self):
        return {"steps": self.steps, "epochs": self.epochs}

    def restore(self, state):
        self.steps, self.epochs = state["steps"], state["epochs"]


def train(comm, *, dies_in="", check_every=50, distribution=None):
    """Train on a rank; return its digest, history, and what a callback has counted."""
    x = np.random.default_rng(0).normal(size=(22, 5)).astype(np.float32)
    model = dt.Sequential(
        [
            dt.layers.Dense(6, "relu", input_shape=(5,)),
            dt.layers.BatchNormalization(),
            dt.layers.Dropout(0.2),
            dt.layers.Dense(2),
        ]
    )
    adam = dt.optimizers.Adam(0.01, gradient_accumulation_steps=None if distribution else 2)
    model.compile(adam, "mse", metrics=["mae"], distribution=distribution, check_replicas_every=check_every)
    note = Note(comm, dies_in)
    history = model.fit(
        x, x[:, :2], 6, EPOCHS, validation_split=0.2, verbose=0, callbacks=[note], reproducible=distribution is None
    )
    assert note.seen == sorted(set(note.seen)), "a step that had ended was taken again"
    return dt.state_digest(model), history.history, note.state()


@functools.cache
def undisturbed(ranks, **how):
    """Return what all ranks return if none dies, and how many messages each sends."""
    results, sent = mortal.run(ranks, lambda comm: train(comm, **how), {})
    assert all(each == results[0] for each in results), results
    return results[0], sent


def survive(ranks, lasts, expected, **how):
    """Return whether all that did not die have come to `expected`; others must have ended with DeadRankError."""
    results, _ = mortal.run(ranks, lambda comm: train(comm, **how), lasts)
    found = [each for rank, each in enumerate(results) if rank not in lasts and each is not None]
    assert all(each == expected or isinstance(each, DeadRankError) for each in found), (lasts, found)
    return found.count(expected) == ranks - len(lasts)


@pytest.mark.parametrize(("ranks", "rank"), [(3, 0), (3, 2), pytest.param(4, 2, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "first", [EVERY // 2, *(pytest.param(n, marks=pytest.mark.long) for n in range(EVERY) if n != EVERY // 2)]
)
def test_same_bits_whatever_message_is_the_last(ranks, rank, first):
    expected, sent = undisturbed(ranks)
    lasts = range(first, sent[rank], EVERY)
    count = sum(survive(ranks, {rank: last}, expected) for last in lasts)
    assert count >= len(lasts) // 2  # not before and after the steps of `fit`


@pytest.mark.parametrize("gap", [0, 5, *(pytest.param(n, marks=pytest.mark.long) for n in range(1, 40) if n != 5)])
def test_another_rank_may_die_while_the_others_shrink(gap):
    expected, _ = undisturbed(3)
    # so many messages later than rank 1, which does not send as many: it joins the others anew meanwhile
    assert survive(3, {1: 100, 2: 44 + gap}, expected)


def test_no_rank_leaves_while_another_may_shrink():
    expected, sent = undisturbed(4, check_every=0)
    for rank, back in itertools.product((0, 2), (3, 8)):
        survive(4, {rank: sent[rank] - back}, expected, check_every=0)


@pytest.mark.parametrize(("event", "is_survived"), [("on_train_batch_begin", True), ("on_train_batch_end", False)])
def test_a_rank_that_is_lost_while_callbacks_communicate_is_survived_before_a_step_only(event, is_survived):
    expected, _ = undisturbed(3)
    results, _ = mortal.run(3, lambda comm: train(comm, dies_in=event), {})
    found = [each for each in results if each is not None]
    if is_survived:
        assert found == [expected, expected]
    else:
        assert len(found) > 0
        assert all("callbacks were being told of the end of a step" in str(error) for error in found)


def test_a_sharded_optimizer_is_not_survived():
    expected, sent = undisturbed(3, distribution=dt.DataParallel(shard_optimizer=True))
    for last in (sent[0] // 3, sent[0] // 2):
        assert not survive(3, {0: last}, expected, distribution=dt.DataParallel(shard_optimizer=True))
