"""Recurrent layers over whole sequences, as composites: a step's equations in a loop."""

from collections.abc import Callable
from functools import partial

from disttrain.autodiff.composite import composite
from disttrain.autodiff.joining import each, nowhere
from disttrain.autodiff.op import array_of
from disttrain.autodiff.ops.elementwise import sigmoid, tanh
from disttrain.autodiff.ops.matrix import dense, matmul
from disttrain.autodiff.ops.shape import stack
from disttrain.backend import Array, get_array_module
from disttrain.kernels import recurrent as kernels

Function = Callable[[Array], Array]


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
    return _lstm_steps(x, kernel, recurrent_kernel, bias, activation, recurrent_activation)


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
    return _gru_steps(x, kernel, recurrent_kernel, bias, activation, recurrent_activation)


@composite
def _lstm(x: Array, kernel: Array, recurrent_kernel: Array, bias: Array) -> Array:
    return _lstm_steps(x, kernel, recurrent_kernel, bias, tanh, sigmoid)


@composite
def _gru(x: Array, kernel: Array, recurrent_kernel: Array, bias: Array) -> Array:
    return _gru_steps(x, kernel, recurrent_kernel, bias, tanh, sigmoid)


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


def _lstm_steps(
    x: Array, kernel: Array, recurrent_kernel: Array, bias: Array, activation: Function, recurrent_activation: Function
) -> Array:
    units = recurrent_kernel.shape[0]
    sums = dense(x, kernel, bias)
    h = c = _nothing_yet(sums, units)
    outputs = []
    for t in range(x.shape[1]):
        i, f, g, o = _gates(sums[:, t] + matmul(h, recurrent_kernel), units)
        c = recurrent_activation(f) * c + recurrent_activation(i) * activation(g)
        h = recurrent_activation(o) * activation(c)
        outputs.append(h)
    return stack(outputs, axis=1)


def _gru_steps(
    x: Array, kernel: Array, recurrent_kernel: Array, bias: Array, activation: Function, recurrent_activation: Function
) -> Array:
    units = recurrent_kernel.shape[0]
    sums = dense(x, kernel, bias[0])
    h = _nothing_yet(sums, units)
    outputs = []
    for t in range(x.shape[1]):
        z, r, k = _gates(sums[:, t], units)
        from_z, from_r, from_k = _gates(dense(h, recurrent_kernel, bias[1]), units)
        keep = recurrent_activation(z + from_z)
        made = activation(k + recurrent_activation(r + from_r) * from_k)
        h = keep * h + (1 - keep) * made
        outputs.append(h)
    return stack(outputs, axis=1)


def _nothing_yet(sums: Array, units: int) -> Array:
    """Return what a sequence begins with."""
    return get_array_module(array_of(sums)).zeros((sums.shape[0], units), sums.dtype)


def _gates(sums: Array, units: int) -> list[Array]:
    return [sums[:, begin : begin + units] for begin in range(0, sums.shape[1], units)]
