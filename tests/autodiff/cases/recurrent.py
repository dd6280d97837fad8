"""Recurrent layers, number by number."""

import math
from functools import partial

import numpy as np

from disttrain import ops
from tests.autodiff.cases.case import case


def logistic(v):
    return 1 / (1 + math.exp(-v))


def lstm(x, kernel, recurrent_kernel, bias, new=math.tanh, gate=logistic):
    """Return a long short-term memory's outputs, unit by unit."""
    units = len(recurrent_kernel)
    y = np.zeros((*x.shape[:2], units))
    for s in range(len(x)):
        h, c = np.zeros(units), np.zeros(units)
        for t in range(x.shape[1]):
            sums = [sum(x[s, t] * kernel[:, j]) + sum(h * recurrent_kernel[:, j]) + bias[j] for j in range(4 * units)]
            for j in range(units):
                i, f, g, o = sums[j::units]
                c[j] = gate(f) * c[j] + gate(i) * new(g)
                y[s, t, j] = gate(o) * new(c[j])
            h = y[s, t]
    return y


def gru(x, kernel, recurrent_kernel, bias, new=math.tanh, gate=logistic):
    """Return a gated recurrent unit's outputs, unit by unit."""
    units = len(recurrent_kernel)
    y = np.zeros((*x.shape[:2], units))
    for s in range(len(x)):
        h = np.zeros(units)
        for t in range(x.shape[1]):
            left = [sum(x[s, t] * kernel[:, j]) + bias[0, j] for j in range(3 * units)]
            right = [sum(h * recurrent_kernel[:, j]) + bias[1, j] for j in range(3 * units)]
            for j in range(units):
                (z, r, k), (of_z, of_r, of_k) = left[j::units], right[j::units]
                keep = gate(z + of_z)
                y[s, t, j] = keep * h[j] + (1 - keep) * new(k + gate(r + of_r) * of_k)
            h = y[s, t]
    return y


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
