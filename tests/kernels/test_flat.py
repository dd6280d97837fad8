"""Optimizers' and elementwise kernels are their definitions to the bit, on any instruction set."""

import numpy as np
import pytest

from disttrain.autodiff.ops import elementwise as definitions
from disttrain.kernels import elementwise
from disttrain.optimizers import SGD, Adam, AdamW
from disttrain.optimizers.optimizer import _KERNELS
from tests.kernels.shapes import LENGTHS

OPTIMIZERS = [SGD(), SGD(0.1, 0.9), SGD(0.1, 0.9, nesterov=True), Adam(), Adam(0.1, 0.8, 0.99, 1e-3), AdamW(0.01, 0.1)]
EVERY_OPTIMIZER = pytest.mark.parametrize(
    "optimizer", OPTIMIZERS, ids=["sgd", "momentum", "nesterov", "adam", "adam 0.1", "adamw"]
)


def state(optimizer, length, special=()):
    generator = np.random.default_rng(length)
    w, g, *slots = generator.standard_normal((2 + len(optimizer.slot_names), length), dtype=np.float32)
    g[: len(special)] = special[:length]
    return w, g, {name: np.abs(slot) for name, slot in zip(optimizer.slot_names, slots, strict=True)}


@EVERY_OPTIMIZER
@pytest.mark.parametrize("length", LENGTHS)
def test_a_step_is_the_definitions_to_the_bit(optimizer, length, instruction_set, guarded):
    w, g, slots = state(optimizer, length, special=[np.nan, np.inf, -np.inf, 0, 1e-42, -0.0, 3e38])
    own, own_g = guarded.copy(w), guarded.copy(g, 12)
    own_slots = {name: guarded.copy(slot, 20) for name, slot in slots.items()}
    for step in (1, 2, 1000):
        numbers = {"learning_rate": 0.01, "step": step}
        with np.errstate(invalid="ignore", over="ignore"):
            optimizer.update(w, g, slots, **numbers)
        assert _KERNELS[type(optimizer).update](optimizer, own, own_g, own_slots, **numbers)
        np.testing.assert_array_equal(own, w)
        np.testing.assert_array_equal(own_g, g)
        for name, slot in slots.items():
            np.testing.assert_array_equal(own_slots[name], slot)


@EVERY_OPTIMIZER
def test_other_dtypes_are_left_to_the_definition_unchanged(optimizer, instruction_set):
    w, g, slots = state(optimizer, 10)
    w, before = w.astype(float), w.astype(float)
    assert not _KERNELS[type(optimizer).update](optimizer, w, g, slots, learning_rate=0.1, step=1)
    np.testing.assert_array_equal(w, before)


@EVERY_OPTIMIZER
def test_what_may_not_be_written_is_an_error_as_in_the_definition(optimizer, instruction_set):
    w, g, _ = state(optimizer, 10)
    w.flags.writeable = False
    before = w.copy()
    with pytest.raises(ValueError, match="read-only"):
        type(optimizer)().apply([g], [w])
    np.testing.assert_array_equal(w, before)


def test_a_subclass_with_a_rule_of_its_own_is_not_computed_by_its_bases_kernel(instruction_set):
    class Still(Adam):
        def update(self, parameter, gradient, slots, *, learning_rate, step):
            pass

    w = np.ones(5, np.float32)
    Still().apply([w.copy()], [w])
    np.testing.assert_array_equal(w, 1)


@pytest.mark.parametrize("length", LENGTHS)
def test_where_positive_is_the_definition_to_the_bit(length, instruction_set, guarded, monkeypatch):
    monkeypatch.setattr(elementwise, "_FEWEST", 0)
    y, g = np.random.default_rng(length).standard_normal((2, length), dtype=np.float32)
    special = np.array([np.nan, np.inf, -np.inf, 0, -0.0], np.float32)
    y[: len(special)] = special[:length]
    g[3 : 3 + len(special)] = special[: max(length - 3, 0)]
    got = elementwise.where_positive(guarded.copy(g), guarded.copy(y)).run()
    with np.errstate(invalid="ignore"):
        expected = definitions._where_positive.definition(g, y)
    np.testing.assert_array_equal(got, expected)
