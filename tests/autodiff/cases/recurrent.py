"""Recurrent layers, number by number."""

import math
from functools import partial

import numpy as np

from disttrain import ops
from tests.autodiff.cases.case import case


def logistic(v):
    return 1 / (1 + math.exp(-v))


def through(step, x, begin, mask=None, zeros=False, drop=None):
    """Return the outputs of `step` at all steps, and the states after the last, sample by sample.

    Args:
        step: makes states, of which the first is the output, of an input, an h to multiply with, and the states before.
        x: sequences.
        begin: the states that they begin with.
        mask: which steps count.
        zeros: whether the output is 0 where a step does not count.
        drop: what h is multiplied by for the product.
    """
    y = np.zeros((*x.shape[:2], begin[0].shape[1]))
    ends = [np.zeros(each.shape) for each in begin]
    for s in range(len(x)):
        states = [each[s] for each in begin]
        for t in range(x.shape[1]):
            if mask is None or mask[s][t]:
                states = step(x[s, t], states[0] * (1 if drop is None else drop[s]), states)
                y[s, t] = states[0]
            elif t > 0 and not zeros:
                y[s, t] = y[s, t - 1]
        for end, state in zip(ends, states, strict=True):
            end[s] = state
    return y, *ends


def lstm_step(kernel, recurrent_kernel, bias, new=math.tanh, gate=logistic):
    """Return a step of a long short-term memory, unit by unit."""
    units = len(recurrent_kernel)

    def step(x, h, states):
        sums = [sum(x * kernel[:, j]) + sum(h * recurrent_kernel[:, j]) + bias[j] for j in range(4 * units)]
        y, c = np.zeros(units), np.zeros(units)
        for j in range(units):
            i, f, g, o = sums[j::units]
            c[j] = gate(f) * states[1][j] + gate(i) * new(g)
            y[j] = gate(o) * new(c[j])
        return y, c

    return step


def gru_step(kernel, recurrent_kernel, bias, new=math.tanh, gate=logistic):
    """Return a step of a gated recurrent unit, unit by unit."""
    units = len(recurrent_kernel)

    def step(x, h, states):
        left = [sum(x * kernel[:, j]) + bias[0, j] for j in range(3 * units)]
        right = [sum(h * recurrent_kernel[:, j]) + bias[1, j] for j in range(3 * units)]
        y = np.zeros(units)
        for j in range(units):
            (z, r, k), (of_z, of_r, of_k) = left[j::units], right[j::units]
            keep = gate(z + of_z)
            y[j] = keep * states[0][j] + (1 - keep) * new(k + gate(r + of_r) * of_k)
        return (y,)

    return step


def rnn_step(kernel, recurrent_kernel, bias, new=math.tanh):
    """Return a step of a plain recurrent layer, unit by unit."""

    def step(x, h, states):
        units = range(len(recurrent_kernel))
        return (np.array([new(sum(x * kernel[:, j]) + sum(h * recurrent_kernel[:, j]) + bias[j]) for j in units]),)

    return step


def lstm(x, kernel, recurrent_kernel, bias, **functions):
    """Return a long short-term memory's outputs, unit by unit."""
    nothing = np.zeros((len(x), len(recurrent_kernel)))
    return through(lstm_step(kernel, recurrent_kernel, bias, **functions), x, [nothing, nothing])[0]


def gru(x, kernel, recurrent_kernel, bias, **functions):
    """Return a gated recurrent unit's outputs, unit by unit."""
    nothing = np.zeros((len(x), len(recurrent_kernel)))
    return through(gru_step(kernel, recurrent_kernel, bias, **functions), x, [nothing])[0]


for name, oracle, bias in (("lstm", lstm, lambda u: (4 * u,)), ("gru", gru, lambda u: (2, 3 * u))):
    gates = {"lstm": 4, "gru": 3}[name]
    for label, samples, steps, n, units in (("small", 2, 3, 2, 3), ("one step", 3, 1, 4, 2), ("one", 1, 2, 1, 1)):
        shapes = (samples, steps, n), (n, gates * units), (units, gates * units), bias(units)
        case(name, label, getattr(ops, name), oracle, *shapes, batched=(0,))
    case(
        name,
        "other activations",
        partial(getattr(ops, name), activation=ops.softplus, recurrent_activation=ops.tanh),
        partial(oracle, new=lambda v: math.log(1 + math.exp(v)), gate=math.tanh),
        (2, 3, 1),
        (1, gates * 2),
        (2, gates * 2),
        bias(2),
        batched=(0,),
    )


# the loops, whose outputs and states are joined along the steps
STEPS = {"lstm_steps": (lstm_step, 4, 2), "gru_steps": (gru_step, 3, 1), "rnn_steps": (rnn_step, 1, 1)}
MASK = np.array([[True, False, True], [False, True, False]])
KEPT = np.array([[2.0, 0, 2], [0, 2, 2]])


def joined(found, join):
    y, *states = found
    return join([y, *[state[:, None] for state in states]], 1)


for name, (step, gates, states) in STEPS.items():
    bias = (2, 3 * 3) if name == "gru_steps" else (gates * 3,)
    shapes = (2, 3, 2), (2, gates * 3), (3, gates * 3), bias, *[(2, 3)] * states
    for label, how in (
        ("begin", {}),
        ("mask", {"mask": MASK}),
        ("zeros", {"mask": MASK, "zeros": True}),
        ("drop", {"drop": KEPT}),
    ):
        case(
            name,
            label,
            lambda x, w, u, b, *begin, name=name, how=how: joined(
                getattr(ops, name)(
                    x, w, u, b, begin=begin,
                    **{**how, **({"drop": lambda h: h * KEPT.astype(h.dtype)} if "drop" in how else {})},
                ),
                lambda arrays, axis: ops.concatenate(arrays, axis=axis),
            ),
            lambda x, w, u, b, *begin, step=step, how=how: joined(
                through(step(w, u, b), x, begin, **how), np.concatenate
            ),
            *shapes,
            batched=(0, *range(4, 4 + states)) if label == "begin" else (),
        )  # fmt: skip
