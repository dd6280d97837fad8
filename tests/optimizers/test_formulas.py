"""Optimizers against their formulas in plain NumPy, with Keras's defaults."""

import math

import numpy as np
import pytest

from disttrain.optimizers import SGD, Adam, AdamW
from disttrain.optimizers.optimizer import _BLOCK

STEPS = 5
SHAPE = (3, 4)


def gradients(shape=SHAPE):
    generator = np.random.default_rng(1)
    return [generator.standard_normal(shape) for _ in range(STEPS)]


def run(optimizer, start, grads):
    w = start.copy()
    for g in grads:
        optimizer.apply([g.copy()], [w])
    return w


# The formulas, each a function of the start and the gradients. Keras 3: keras/src/optimizers/{sgd,adam}.py


def sgd(w, grads, rate=0.01):
    for g in grads:
        w = w - rate * g
    return w


def momentum(w, grads, rate=0.01, momentum=0.9):
    v = 0
    for g in grads:
        v = momentum * v - rate * g
        w = w + v
    return w


def nesterov(w, grads, rate=0.01, momentum=0.9):
    v = 0
    for g in grads:
        v = momentum * v - rate * g
        w = w + momentum * v - rate * g
    return w


def adam(w, grads, rate=0.001, beta_1=0.9, beta_2=0.999, epsilon=1e-7, decay=0.0):
    m = v = 0
    for t, g in enumerate(grads, 1):
        w = w - w * decay * rate
        m = m + (g - m) * (1 - beta_1)
        v = v + (g**2 - v) * (1 - beta_2)
        alpha = rate * math.sqrt(1 - beta_2**t) / (1 - beta_1**t)
        w = w - m * alpha / (np.sqrt(v) + epsilon)
    return w


def adamw(w, grads, decay=0.004, **options):
    return adam(w, grads, decay=decay, **options)


OPTIMIZERS = {
    "sgd": (SGD, sgd, {}),
    "sgd 0.5": (lambda: SGD(0.5), sgd, {"rate": 0.5}),
    "momentum": (lambda: SGD(momentum=0.9), momentum, {}),
    "nesterov": (lambda: SGD(0.1, 0.8, nesterov=True), nesterov, {"rate": 0.1, "momentum": 0.8}),
    "adam": (Adam, adam, {}),
    "adam 0.1": (
        lambda: Adam(0.1, 0.8, 0.99, 1e-3),
        adam,
        {"rate": 0.1, "beta_1": 0.8, "beta_2": 0.99, "epsilon": 1e-3},
    ),
    "adamw": (AdamW, adamw, {}),
    "adamw 0.1": (lambda: AdamW(0.1, 0.3), adamw, {"rate": 0.1, "decay": 0.3}),
}
EVERY = pytest.mark.parametrize(("make", "formula", "options"), OPTIMIZERS.values(), ids=OPTIMIZERS)


@EVERY
def test_several_steps_are_the_formula(make, formula, options):
    start = np.random.default_rng(0).standard_normal(SHAPE)
    got, expected = run(make(), start, gradients()), formula(start, gradients(), **options)
    assert not np.allclose(expected, start, rtol=1e-6)
    # a step rounds fewer than 20 times, on numbers below 5
    np.testing.assert_allclose(got, expected, rtol=0, atol=STEPS * 20 * 5 * 2**-53)


def test_nesterov_without_momentum_is_plain():
    start = np.ones(SHAPE)
    plain = run(SGD(), start, gradients())
    np.testing.assert_array_equal(run(SGD(nesterov=True), start, gradients()), plain)


def test_a_decay_of_zero_is_adam():
    start = np.ones(SHAPE)
    np.testing.assert_array_equal(run(AdamW(weight_decay=0.0), start, gradients()), run(Adam(), start, gradients()))


def test_adams_first_step_is_the_learning_rate_whatever_the_gradient():
    w = run(Adam(0.5), np.zeros(3), [np.array([1e-3, -1.0, 1e3])])
    # m / sqrt(v) is 1 - beta_1 over the root of 1 - beta_2, which the correction undoes; epsilon stays
    root = math.sqrt(1 - 0.999)
    expected = [-0.5 * g / (abs(g) + 1e-7 / root) for g in (1e-3, -1.0, 1e3)]
    np.testing.assert_allclose(w, expected, rtol=50 * 2**-53)


@EVERY
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [_BLOCK, _BLOCK + 1, 2 * _BLOCK + 777])
def test_parameters_larger_than_a_block_are_changed_to_the_bit_as_in_one(make, formula, options, dtype, size):
    generator = np.random.default_rng(2)
    start = generator.standard_normal(size).astype(dtype)
    grads = [generator.standard_normal(size).astype(dtype) for _ in range(3)]
    whole, optimizer = start.copy(), make()
    slots = {name: np.zeros_like(start) for name in optimizer.slot_names}
    for step, g in enumerate(grads, 1):
        make().update(whole, g, slots, learning_rate=optimizer.learning_rate, step=step)
    np.testing.assert_array_equal(run(optimizer, start, grads), whole)
    for name, slot in slots.items():
        np.testing.assert_array_equal(optimizer.slots[0][name], slot)
    # and to the bit as each element alone would be, in the middle and beside the seams
    for at in (0, _BLOCK - 1, size - 1):
        assert run(make(), start[at : at + 1], [g[at : at + 1] for g in grads]) == whole[at]


def test_float16_gradients_whose_squares_vanish_still_take_whole_steps():
    # Adam's first step is the learning rate, whatever the size of the gradient: 1e-5 squared is 0 in float16
    w = np.zeros(3, "float16")
    Adam(learning_rate=2**-10).apply([np.full(3, 1e-5, "float16")], [w])
    np.testing.assert_allclose(w, -(2**-10) / (1 + 1e-7 / (1e-5 * np.sqrt(1 - 0.999))), rtol=2**-9)


@EVERY
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_parameters_keep_their_dtype_and_gradients_their_values(make, formula, options, dtype):
    w, g = np.ones(SHAPE, dtype), np.full(SHAPE, 0.5, dtype)
    optimizer = make()
    optimizer.apply([g], [w])
    assert w.dtype == dtype
    assert all(slot.dtype == "float32" for slot in optimizer.slots[0].values())
    np.testing.assert_array_equal(g, np.full(SHAPE, 0.5, dtype))
    expected = formula(np.ones(SHAPE), [np.full(SHAPE, 0.5)], **options)
    np.testing.assert_allclose(w, expected, rtol=0, atol=20 * 2 * (2**-11 if dtype == "float16" else 2**-24))
