"""Recurrent layers over whole sequences, as composites: a step's equations in a loop.

`lstm` and `gru` begin with nothing and see all; kernels compute them. `lstm_steps`, `gru_steps` and `rnn_steps` are the
loops, which also begin with a state, leave steps out, drop elements of it, and return what it is at the end.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from disttrain.autodiff.composite import composite
from disttrain.autodiff.joining import each, nowhere
from disttrain.autodiff.op import array_of
from disttrain.autodiff.ops.elementwise import sigmoid, tanh, where
from disttrain.autodiff.ops.matrix import dense, matmul
from disttrain.autodiff.ops.shape import stack
from disttrain.backend import Array, get_array_module
from disttrain.kernels import recurrent as kernels

Function = Callable[[Array], Array]
Cell = Callable[[Array, Array, Sequence[Array]], list[Array]]


def lstm(
    x: Array, kernel: Array, recurrent_kernel: Array, bias: Array, *, activation: Function = tanh,
    recurrent_activation: Function = sigmoid,
) -> Array:  # fmt: skip
    """Return the outputs of a long short-term memory at all steps.

    At each step ``i, f, g, o = x @ kernel + h @ recurrent_kernel + bias``,
    ``c = recurrent_activation(f) * c + recurrent_activation(i) * activation(g)`` and the output
    ``h = recurrent_activation(o) * activation(c)``; h and c begin as 0.

    Shapes: ``(samples, steps, n), (n, 4 * units), (units, 4 * units), (4 * units,) -> (samples, steps, units)``.

    Source: Hochreiter & Schmidhuber, "Long short-term memory", 1997; Gers et al., "Learning to forget", 2000.
    """
    if activation is tanh and recurrent_activation is sigmoid:
        return _lstm(x, kernel, recurrent_kernel, bias)
    functions = {"activation": activation, "recurrent_activation": recurrent_activation}
    return lstm_steps(x, kernel, recurrent_kernel, bias, **functions)[0]


def gru(
    x: Array, kernel: Array, recurrent_kernel: Array, bias: Array, *, activation: Function = tanh,
    recurrent_activation: Function = sigmoid,
) -> Array:  # fmt: skip
    """Return the outputs of a gated recurrent unit at all steps.

    At each step ``z, r, k = x @ kernel + bias[0]``, ``z', r', k' = h @ recurrent_kernel + bias[1]``; with
    ``keep = recurrent_activation(z + z')`` the output is
    ``h = keep * h + (1 - keep) * activation(k + recurrent_activation(r + r') * k')``; h begins as 0.

    Shapes: ``(samples, steps, n), (n, 3 * units), (units, 3 * units), (2, 3 * units) -> (samples, steps, units)``.

    Source: Cho et al., "Learning phrase representations using RNN encoder-decoder", 2014; Keras, ``reset_after=True``.
    """
    if activation is tanh and recurrent_activation is sigmoid:
        return _gru(x, kernel, recurrent_kernel, bias)
    functions = {"activation": activation, "recurrent_activation": recurrent_activation}
    return gru_steps(x, kernel, recurrent_kernel, bias, **functions)[0]


@composite
def _lstm(x: Array, kernel: Array, recurrent_kernel: Array, bias: Array) -> Array:
    return lstm_steps(x, kernel, recurrent_kernel, bias)[0]


@composite
def _gru(x: Array, kernel: Array, recurrent_kernel: Array, bias: Array) -> Array:
    return gru_steps(x, kernel, recurrent_kernel, bias)[0]


def _flops(x: Array, *kernels: Array) -> int:
    """Return the operations of products with `kernels` in all steps."""
    return 2 * int(x.shape[0] * x.shape[1]) * sum(int(kernel.size) for kernel in kernels)


for _op, _name in ((_lstm, "lstm"), (_gru, "gru")):
    _op.flops = lambda _made, x, w, u, _b: _flops(x, w, u)
    # gates again, and two products for each of those
    _op.gradient(0, 1, 2, 3).flops = lambda _made, _g, _y, x, w, u, _b: _flops(x, w, w, w, u, u, u)
    _op.gradient(1, 2, 3).flops = lambda _made, _g, _y, x, w, u, _b: _flops(x, w, w, u, u, u)
    _op.joined = each(0, inner=2)
    _op.gradient(0, 1, 2, 3).joined = _op.gradient(1, 2, 3).joined = nowhere
    _op.kernel(partial(kernels.sequence, _name))
    _op.gradient(0, 1, 2, 3).kernel(partial(kernels.gradients, _name, True))
    _op.gradient(1, 2, 3).kernel(partial(kernels.gradients, _name, False))


def lstm_steps(
    x: Array, kernel: Array, recurrent_kernel: Array, bias: Array, *, activation: Function = tanh,
    recurrent_activation: Function = sigmoid, **how: Any,
) -> tuple[Array, ...]:  # fmt: skip
    """Return the outputs of `lstm` at all steps, and h and c after the last; `how` as of `rnn_steps`."""
    units = recurrent_kernel.shape[0]

    def cell(sums: Array, h: Array, states: Sequence[Array]) -> list[Array]:
        i, f, g, o = _gates(sums + matmul(h, recurrent_kernel), units)
        c = recurrent_activation(f) * states[1] + recurrent_activation(i) * activation(g)
        return [recurrent_activation(o) * activation(c), c]

    return _through(cell, dense(x, kernel, bias), units, 2, **how)


def gru_steps(
    x: Array, kernel: Array, recurrent_kernel: Array, bias: Array, *, activation: Function = tanh,
    recurrent_activation: Function = sigmoid, **how: Any,
) -> tuple[Array, ...]:  # fmt: skip
    """Return the outputs of `gru` at all steps, and h after the last; `how` as of `rnn_steps`."""
    units = recurrent_kernel.shape[0]

    def cell(sums: Array, h: Array, states: Sequence[Array]) -> list[Array]:
        z, r, k = _gates(sums, units)
        from_z, from_r, from_k = _gates(dense(h, recurrent_kernel, bias[1]), units)
        keep = recurrent_activation(z + from_z)
        made = activation(k + recurrent_activation(r + from_r) * from_k)
        return [keep * states[0] + (1 - keep) * made]

    return _through(cell, dense(x, kernel, bias[0]), units, 1, **how)


def rnn_steps(
    x: Array, kernel: Array, recurrent_kernel: Array, bias: Array, *, activation: Function = tanh, **how: Any
) -> tuple[Array, ...]:
    """Return the outputs of a plain recurrent layer at all steps, and h after the last.

    At each step the output is ``h = activation(x @ kernel + h @ recurrent_kernel + bias)``.

    Shapes: ``(samples, steps, n), (n, units), (units, units), (units,) -> (samples, steps, units), (samples, units)``.

    Args:
        x: sequences.
        kernel: for `x`.
        recurrent_kernel: for the output of the step before.
        bias: added.
        activation: of an output.
        how: ``begin``, the states that a sequence begins with, ``(samples, units)`` each; by default 0.
            ``mask``, bool, ``(samples, steps)``: where it is False states stay, and the output is that of the step
            before, 0 at first; with ``zeros=True`` it is always 0. ``drop``, a function of h, gives what
            `recurrent_kernel` is multiplied with.

    Source: Elman, "Finding structure in time", 1990.
    """

    def cell(sums: Array, h: Array, _states: Sequence[Array]) -> list[Array]:
        return [activation(sums + matmul(h, recurrent_kernel))]

    return _through(cell, dense(x, kernel, bias), recurrent_kernel.shape[0], 1, **how)


def _through(
    cell: Cell, sums: Array, units: int, width: int, *, begin: Sequence[Array] | None = None,
    mask: Array | None = None, zeros: bool = False, drop: Function = lambda h: h,
) -> tuple[Array, ...]:  # fmt: skip
    """Return the outputs of `cell` at all steps, and its states, `width` of them, after the last."""
    nothing = get_array_module(array_of(sums)).zeros((sums.shape[0], units), sums.dtype)
    states = [nothing] * width if begin is None else list(begin)
    outputs: list[Array] = []
    for t in range(sums.shape[1]):
        new = cell(sums[:, t], drop(states[0]), states)
        output = new[0]
        if mask is not None:
            here = mask[:, t : t + 1]
            output = where(here, output, outputs[-1] if outputs and not zeros else nothing)
            new = [where(here, *pair) for pair in zip(new, states, strict=True)]
        states = new
        outputs.append(output)
    return (stack(outputs, axis=1), *states)


def _gates(sums: Array, units: int) -> list[Array]:
    return [sums[:, begin : begin + units] for begin in range(0, sums.shape[1], units)]
