"""Replicas that differ are found, named, and mended where that was asked for."""

import logging

import numpy as np
import pytest

import disttrain as dt
from disttrain import data_parallel
from disttrain.autodiff import Tensor
from disttrain.comm import threads
from disttrain.errors import CommError, ConfigError, DriftError
from disttrain.training import agreement, drift
from tests.training import worlds

pytestmark = pytest.mark.timeout(60)


class FlipABit(dt.callbacks.Callback):
    """Changes one bit of a weight on one rank after a step."""

    def __init__(self, rank, step, weight, bit=0):
        self.rank, self.step, self.weight, self.bit = rank, step, weight, bit

    def on_train_batch_end(self, batch, logs):
        if dt.comm.current().rank == self.rank and self.model.optimizer.iterations == self.step:
            weight = next(w for w in self.model.weights if w.name == self.weight)
            weight.data.reshape(-1).view(np.uint32)[-1:] ^= np.uint32(1 << self.bit)


class KeepStatistics(dt.callbacks.Callback):
    """Keeps what a layer's statistics are after the last step."""

    def __init__(self, layer):
        self.layer = layer

    def on_train_batch_end(self, batch, logs):
        self.bytes = [weight.data.tobytes() for weight in self.layer.non_trainable_weights]


def bits(model):
    """Return the bytes of the weights on this rank."""
    return [weight.data.tobytes() for weight in model.weights]


def train(steps, callback, **options):
    """Return a model of two layers, trained for so many steps."""
    x, y = worlds.blobs(12)
    model = dt.Sequential([dt.layers.Dense(5, "tanh", input_shape=(4,)), dt.layers.Dense(3)])
    loss = dt.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, **options)
    model.fit(x.astype(np.float32), y, batch_size=12, epochs=steps, verbose=0, callbacks=[callback] if callback else [])
    return model


@pytest.mark.parametrize("bit", [0, 22])
@pytest.mark.parametrize(("world_size", "rank", "who"), [(2, 1, "rank 0 and 1 differ"), (3, 0, "rank 0 differs from")])
def test_one_bit_on_one_rank_is_found_within_fifty_steps_and_named(world_size, rank, who, bit):
    found = worlds.errors(world_size, lambda comm: train(60, FlipABit(rank, 7, "dense_1/kernel", bit)))
    assert {type(error) for error in found} == {DriftError}
    assert len({str(error) for error in found}) == 1
    assert f"after step 49, {who}" in str(found[0])
    assert "'dense" in str(found[0])


def test_the_tensor_is_named_where_it_was_changed_right_before():
    found = worlds.errors(3, lambda comm: train(4, FlipABit(2, 4, "dense_1/bias"), check_replicas_every=4))
    assert "after step 3, rank 2 differs from the other 2 in 'dense_1/bias';" in str(found[0])


def test_what_the_optimizer_remembers_is_compared_as_well():
    class FlipASlot(FlipABit):
        def on_train_batch_end(self, batch, logs):
            if dt.comm.current().rank == self.rank and self.model.optimizer.iterations == self.step:
                self.model.optimizer.slots[0][self.weight].view(np.uint32)[0] ^= np.uint32(1)

    found = worlds.errors(3, lambda comm: train(4, FlipASlot(2, 4, "velocity"), check_replicas_every=4))
    assert "after step 3, rank 2 differs from the other 2 in 'dense/kernel/velocity';" in str(found[0])


def test_a_change_after_the_last_look_is_found_at_the_end():
    assert type(worlds.errors(2, lambda comm: train(5, FlipABit(1, 5, "dense/kernel")))[1]) is DriftError


@pytest.mark.parametrize("world_size", [2, 3])
def test_healed_replicas_are_equal_to_the_bit_and_say_so_once(world_size, caplog):
    def work(comm):
        options = {"check_replicas_every": 5, "on_drift": "heal"}
        model = train(20, FlipABit(1, 7, "dense/kernel", 20), **options)
        slots = {name: array for each in model.optimizer.slots for name, array in each.items()}
        return bits(model), {name: array.tobytes() for name, array in slots.items()}

    with caplog.at_level(logging.WARNING, "disttrain"):
        results = threads.run(world_size, work)
    assert results == [results[0]] * world_size
    said = [r.getMessage() for r in caplog.records if "drifted" in r.getMessage()]
    assert len(said) == 1
    assert "after step 9, " in said[0]
    assert "take over the state of rank 0" in said[0]


@pytest.mark.parametrize("options", [{"local_steps": 3}, {"shard_optimizer": True}])
def test_ranks_that_differ_by_design_are_compared_when_they_agree_and_healed(options, caplog):
    distribution = data_parallel.DataParallel(**options)

    def work(comm):
        options = {"check_replicas_every": 2, "on_drift": "heal", "distribution": distribution}
        return bits(train(12, FlipABit(1, 12, "dense/kernel", 20), **options))

    with caplog.at_level(logging.WARNING, "disttrain"):
        first, second = threads.run(2, work)
    assert first == second
    # at the end of the epoch the mean of local steps makes weights equal before they are compared
    assert caplog.text.count("drifted") == distribution.shard_optimizer


def test_nobody_looks_where_that_is_switched_off():
    first, second = threads.run(2, lambda c: bits(train(9, FlipABit(1, 9, "dense/bias"), check_replicas_every=0)))
    assert first != second


def test_statistics_of_a_rank_s_own_are_no_drift():
    def work(comm):
        x, y = worlds.blobs(12)
        norm = dt.layers.BatchNormalization(synchronized=False)
        model = dt.Sequential([dt.layers.Dense(5, input_shape=(4,)), norm, dt.layers.Dense(3)])
        model.compile("sgd", dt.losses.SparseCategoricalCrossentropy(from_logits=True), check_replicas_every=1)
        seen = KeepStatistics(norm)
        model.fit(x, y, batch_size=12, epochs=3, verbose=0, callbacks=[seen])
        return seen.bytes

    first, second = threads.run(2, work)
    assert first != second


def test_any_single_bit_changes_the_digest_of_its_weight_alone():
    parameters = [Tensor(np.random.default_rng(n).standard_normal(n), requires_grad=True) for n in (1, 9, 16)]
    (buffer,) = data_parallel.flatten(parameters)
    before = drift.digests(buffer, buffer.data)
    for number, parameter in enumerate(parameters):
        for bit in range(64):
            words = parameter.data.view(np.uint64)
            words[-1:] ^= np.uint64(1 << bit)
            after = drift.digests(buffer, buffer.data)
            assert [n for n in range(3) if after[n] != before[n]] == [number]
            words[-1:] ^= np.uint64(1 << bit)
    assert all(0 <= digest < 1 << 53 for digest in before)


@pytest.mark.parametrize(
    "options", [{"check_replicas_every": -1}, {"check_replicas_every": "often"}, {"on_drift": "no"}]
)
def test_other_policies_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        train(1, None, **options)


FACTS = ["the code of disttrain", "a version", "the instruction set of the kernels", "the precision", "the seed"]


@pytest.mark.parametrize("number", range(len(FACTS)))
def test_ranks_in_other_circumstances_are_told_before_the_first_step(monkeypatch, number):
    original = agreement.circumstances

    def elsewhere():
        facts = original()
        if dt.comm.current().rank == 1:
            value = facts[number].value
            changed = [*value[:-1], [value[-1][0], "1.0"]] if isinstance(value, list) else f"another {value}"
            facts[number] = drift_of(facts[number], changed)
        return facts

    monkeypatch.setattr("disttrain.training.replica.circumstances", elsewhere)
    found = worlds.errors(2, lambda comm: train(1, None))
    assert {type(error) for error in found} == {CommError}
    assert FACTS[number] in str(found[0])
    assert str(found[0]) == str(found[1])
    assert "rank 0 has" in str(found[0])
    assert "rank 1 has" in str(found[0])


def drift_of(fact, value):
    return agreement.Fact(what=fact.what, value=value, remedy=fact.remedy)


def test_a_plan_that_differs_is_told_with_its_first_call_that_does():
    class Odd(dt.layers.Layer):
        def call(self, x):
            return dt.ops.tanh(x) if dt.comm.current().rank == 0 else dt.ops.relu(x)

    def work(comm):
        x, y = worlds.blobs(12)
        model = dt.Sequential([dt.layers.Dense(3, input_shape=(4,)), Odd()])
        model.compile("sgd", dt.losses.SparseCategoricalCrossentropy(from_logits=True), static=True)
        model.fit(x, y, batch_size=12, epochs=5, verbose=0)

    found = worlds.errors(2, work)
    assert {type(error) for error in found} == {CommError}
    assert "the plan of a step differs between ranks: rank 0 has ['tanh'" in str(found[0])
