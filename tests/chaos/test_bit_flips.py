"""One bit that is wrong on one rank is named within the steps between two looks, or has been rounded away by then."""

import json
import random
from collections import Counter

import numpy as np
import pytest

import disttrain as dt
from disttrain.comm import threads
from disttrain.comm.heads import HEAD_BYTES
from disttrain.errors import DriftError, NonFiniteError
from tests.training import worlds

pytestmark = [pytest.mark.timeout(1200), pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # of what overflows

RANKS, EVERY, STEPS = 3, 5, 12
TRIALS = [20, pytest.param(250, marks=pytest.mark.long)]  # a thousand over all fields


class Flip(dt.callbacks.Callback):
    """Flips a bit on one rank: of weights or slots before a step, or of the summed gradients in it."""

    def __init__(self, comm, field, rank, step, chance):
        self.comm, self.field, self.rank, self.step, self.chance = comm, field, rank, step, chance

    def on_train_begin(self):
        replica = self.model.current_fit.replica
        apply = replica.update.apply

        def flipped():
            if self.field == "sums":
                self.meet(replica, lambda: replica.gradients.flat)
            apply()

        replica.update.apply = flipped

    def on_train_batch_begin(self, batch):
        replica = self.model.current_fit.replica
        if self.field == "weights":
            self.meet(replica, lambda: [buffer.data for buffer in replica.buffers])
        if self.field == "slots":
            self.meet(replica, lambda: [self.chance.choice(list(each.values())) for each in replica.optimizer.slots])

    def meet(self, replica, arrays):
        if (self.comm.rank, replica.optimizer.steps) == (self.rank, self.step):
            (buffer,), (flat,) = replica.buffers, arrays()
            _, place = self.chance.choice(buffer.places)
            flip(flat, self.chance.randrange(place.start, place.stop), self.chance)


def flip(flat, at, chance):
    words = flat[at : at + 1].view(np.uint8)
    words[chance.randrange(words.size)] ^= np.uint8(1 << chance.randrange(8))


def numbers_in(message):
    """Return the floats that a message is, or, as bytes, those that a head carries; none of a text."""
    flat = message.reshape(-1)
    if flat.dtype.kind == "f":
        return flat
    carried = flat.view(np.uint8)[HEAD_BYTES:]
    try:
        json.loads(carried.tobytes())
    except ValueError:
        return carried
    return carried[:0]


def train(callbacks=()):
    """Return all bits of weights and slots that a rank ends with, by name."""
    x, y = worlds.blobs(12)
    model = dt.Sequential([dt.layers.Dense(5, "tanh", input_shape=(4,)), dt.layers.Dense(3)])
    loss = dt.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, check_replicas_every=EVERY)
    model.fit(x.astype(np.float32), y, batch_size=12, epochs=STEPS, verbose=0, callbacks=list(callbacks))
    (replica,) = model._replicas.values()
    arrays = {**worlds.weights(model), **replica.update.slots()}
    return {name: array.tobytes() for name, array in arrays.items()}


def outcomes(function):
    """Return for each rank what ``function(comm)`` returns there, or the error that it ends with."""

    def outcome(comm):
        try:
            return function(comm)
        except Exception as error:  # whatever wrong bits lead to
            return error

    return threads.run(RANKS, outcome)


@pytest.mark.parametrize("trials", TRIALS)
@pytest.mark.parametrize("field", ["weights", "slots", "sums"])
def test_a_flip_on_one_rank_is_named_at_the_next_look_or_gone(field, trials, figures):
    seen = Counter()
    for number in range(trials):
        chance = random.Random(number)
        rank, step = chance.randrange(RANKS), chance.randrange(STEPS)
        found = outcomes(lambda comm: train([Flip(comm, field, rank, step, chance)]))  # noqa: B023
        kinds = {type(each) for each in found}
        assert len(kinds) == 1, found
        (kind,), words = kinds, str(found[0])
        last = min(step // EVERY * EVERY + EVERY - 1, STEPS - 1)
        if kind is DriftError:
            assert f"after step {last}, rank {rank} differs from the other 2 in" in words
        elif kind is NonFiniteError:
            # at this rank, or at all: a sum may have carried it to them
            assert step <= int(words.partition("at step ")[2].split()[0]) <= last
        else:
            assert found == [found[0]] * RANKS, "ranks end with other bits, and nobody says so"
        seen["gone" if kind is dict else kind.__name__] += 1
    assert seen["DriftError"] > trials // 2
    figures.append(f"{trials} bits flipped in {field} of one of {RANKS} ranks: {dict(seen)}")


@pytest.mark.parametrize("trials", TRIALS)
def test_a_flip_in_numbers_on_their_way_leaves_replicas_equal_or_is_an_error(monkeypatch, figures, trials):
    """A wrong sum that all ranks get is what no rank can see; on a real wire TCP's own check comes first."""
    post, sent = threads._World.post, [0, -1]

    def posted(world, route, message):
        numbers = numbers_in(message)
        sent[0] += numbers.size > 0
        if sent[0] == sent[1] and numbers.size:
            flip(numbers, chance.randrange(numbers.size), chance)
        post(world, route, message)

    monkeypatch.setattr(threads._World, "post", posted)
    chance = random.Random(0)
    (right, *_) = outcomes(lambda comm: train())
    total, seen = sent[0], Counter()
    for number in range(trials):
        chance = random.Random(number)
        sent[:] = 0, chance.randrange(total) + 1
        found = outcomes(lambda comm: train())
        errors = [each for each in found if isinstance(each, Exception)]
        if not errors:
            assert found == [found[0]] * RANKS, "ranks end with other bits, and nobody says so"
        what = type(errors[0]).__name__ if errors else "gone" if found[0] == right else "all ranks alike"
        seen[what] += 1
    assert sum(seen.values()) == trials
    figures.append(f"{trials} bits flipped in numbers on their way between {RANKS} ranks: {dict(seen)}")
