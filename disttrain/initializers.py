"""Initial weights. An initializer is a function from a random generator and a shape to an array.

Formulas and names as in Keras 3: https://keras.io/api/layers/initializers/
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from disttrain.errors import ConfigError, unknown_name

Initializer = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray[Any, Any]]


def zeros(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Return zeros."""
    return np.zeros(shape)


def ones(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Return ones."""
    return np.ones(shape)


def constant(value: float) -> Initializer:
    """Return an initializer that fills with `value`."""
    return lambda generator, shape: np.full(shape, float(value))


def random_normal(mean: float = 0.0, stddev: float = 0.05) -> Initializer:
    """Return an initializer that draws from a normal distribution."""
    return lambda generator, shape: generator.normal(mean, stddev, shape)


def random_uniform(minval: float = -0.05, maxval: float = 0.05) -> Initializer:
    """Return an initializer that draws uniformly from ``[minval, maxval)``."""
    return lambda generator, shape: generator.uniform(minval, maxval, shape)


def truncated_normal(mean: float = 0.0, stddev: float = 0.05) -> Initializer:
    """Return an initializer that draws from a normal distribution and draws again beyond two `stddev`."""

    def draw(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        values = generator.standard_normal(shape)
        outside = np.abs(values) > 2
        while outside.any():
            values[outside] = generator.standard_normal(int(outside.sum()))
            outside = np.abs(values) > 2
        return mean + stddev * values

    return draw


def variance_scaling(scale: float, mode: str, distribution: str) -> Initializer:
    """Return an initializer whose variance is ``scale / n``.

    Args:
        scale: a factor: 1 for tanh and linear layers, 2 before relu.
        mode: what n is: ``"fan_in"``, ``"fan_out"`` or ``"fan_avg"``.
        distribution: ``"uniform"`` or ``"truncated_normal"``.

    Sources: Glorot & Bengio, "Understanding the difficulty of training deep feedforward neural networks",
    2010; He et al., "Delving deep into rectifiers", 2015.
    """
    if mode not in ("fan_in", "fan_out", "fan_avg"):
        raise unknown_name("mode", mode, ("fan_in", "fan_out", "fan_avg"))
    if distribution not in ("uniform", "truncated_normal"):
        raise unknown_name("distribution", distribution, ("uniform", "truncated_normal"))

    def draw(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        fan_in, fan_out = _fans(shape)
        n = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[mode]
        variance = scale / max(1.0, n)
        if distribution == "uniform":
            limit = math.sqrt(3 * variance)
            return generator.uniform(-limit, limit, shape)
        # the standard deviation of a standard normal distribution cut at two
        return truncated_normal(0.0, math.sqrt(variance) / 0.87962566103423978)(generator, shape)

    return draw


def orthogonal(gain: float = 1.0) -> Initializer:
    """Return an initializer of matrices with orthonormal columns, or rows where there are fewer, times `gain`.

    The axes before the last count as one.

    Source: Saxe, McClelland & Ganguli, "Exact solutions to the nonlinear dynamics of learning in deep linear neural
    networks", 2013.
    """

    def draw(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        if len(shape) < 2:
            raise ConfigError(f"orthogonal: a weight of two axes or more is needed, not of shape {shape}")
        rows, columns = math.prod(shape[:-1]), shape[-1]
        q, r = np.linalg.qr(generator.standard_normal((max(rows, columns), min(rows, columns))))
        q = q * np.where(np.diag(r) < 0, -1, 1)  # or some matrices would be more likely than others
        return (gain * (q if rows >= columns else q.T)).reshape(shape)

    return draw


_KNOWN: dict[str, Initializer] = {
    "zeros": zeros,
    "ones": ones,
    "random_normal": random_normal(),
    "random_uniform": random_uniform(),
    "truncated_normal": truncated_normal(),
    "uniform": random_uniform(),  # Keras's name for it where embeddings begin
    "glorot_uniform": variance_scaling(1, "fan_avg", "uniform"),
    "glorot_normal": variance_scaling(1, "fan_avg", "truncated_normal"),
    "he_uniform": variance_scaling(2, "fan_in", "uniform"),
    "he_normal": variance_scaling(2, "fan_in", "truncated_normal"),
    "lecun_uniform": variance_scaling(1, "fan_in", "uniform"),
    "lecun_normal": variance_scaling(1, "fan_in", "truncated_normal"),
    "orthogonal": orthogonal(),
}


def get(initializer: str | Initializer) -> Initializer:
    """Return the initializer of a name, or `initializer` itself when it is a function."""
    if isinstance(initializer, str):
        if initializer not in _KNOWN:
            raise unknown_name("initializer", initializer, _KNOWN)
        return _KNOWN[initializer]
    if not callable(initializer):
        raise ConfigError(f"an initializer is a name or a function, not {initializer!r}")
    return initializer


def _fans(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return how many inputs and outputs a weight has: a kernel's window counts for both."""
    if len(shape) < 2:
        n = shape[0] if shape else 1
        return n, n
    window = math.prod(shape[:-2])
    return window * shape[-2], window * shape[-1]
