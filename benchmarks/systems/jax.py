"""JAX: one jitted function for the whole step, which reuses the buffers of weights and optimizer."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# before JAX is imported; one core
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.architecture import (
    EPSILON,
    MOMENTUM,
    Array,
    Attention,
    BatchNorm,
    Conv,
    Dense,
    Embedding,
    Flatten,
    GlobalMean,
    LayerNorm,
    MaxPool,
    Part,
    Residual,
)
from benchmarks.systems import Built
from benchmarks.workloads import Optimizer, Workload

PACKAGES = ("jax", "jaxlib")
PRECISION = "float32"


def variants(workload: Workload, task: str) -> Sequence[str]:
    """Return the one way."""
    return ("jit",)


def build(workload: Workload, variant: str) -> Built:
    """Return the model: a jitted step on buffers that are donated, a jitted prediction."""
    inputs, targets = workload.batch()
    x, y = jnp.asarray(inputs), jnp.asarray(targets)
    weights = [jnp.asarray(array) for array in workload.weights()]
    widths = [part.channels for part in _norms(workload.parts)]
    averages = [(jnp.zeros(n), jnp.ones(n)) for n in widths]
    state = weights, averages, _slots(workload.optimizer, weights)

    def loss_of(weights: Any, x: Any, y: Any) -> Any:
        moments: list[Any] = []
        logits = _apply(workload.parts, iter(weights), x, moments.append)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), y[..., None], axis=-1)
        return -chosen.mean(), moments

    def update(state: Any, x: Any, y: Any) -> Any:
        weights, averages, slots = state
        (loss, moments), gradients = jax.value_and_grad(loss_of, has_aux=True)(weights, x, y)
        averages = jax.tree.map(lambda a, m: MOMENTUM * a + (1 - MOMENTUM) * m, averages, moments)
        weights, slots = _updated(workload.optimizer, weights, gradients, slots)
        return (weights, averages, slots), loss

    jitted = jax.jit(update, donate_argnums=0)

    def logits_of(state: Any, x: Any) -> Any:
        weights, averages, _ = state
        return _apply(workload.parts, iter(weights), x, averages=iter(averages))

    forward = jax.jit(logits_of)
    size = len(inputs)

    def step() -> Any:
        nonlocal state
        state, loss = jax.block_until_ready(jitted(state, x, y))
        return loss

    def predict(x: Array) -> Array:
        return np.concatenate([forward(state, x[at : at + size]) for at in range(0, len(x), size)])

    generator = np.random.default_rng(0)

    def epoch(x: Array, y: Array) -> None:
        nonlocal state
        order = generator.permutation(len(x))
        for rows in np.split(order, range(size, len(x), size)):
            state, _ = jitted(state, x[rows], y[rows])
        jax.block_until_ready(state)

    return Built(parameters=sum(weight.size for weight in weights), step=step, predict=predict, epoch=epoch)


def product(a: Array, b: Array) -> Array:
    """Return ``a @ b``."""
    result: Array = jax.device_get(jax.jit(jnp.matmul)(a, b))
    return result


def _slots(rule: Optimizer, weights: Any) -> Any:
    zeros = jax.tree.map(jnp.zeros_like, weights)
    return zeros if rule.name == "sgd" else (zeros, jax.tree.map(jnp.zeros_like, weights), jnp.zeros(()))


def _updated(rule: Optimizer, weights: Any, gradients: Any, slots: Any) -> Any:
    rate = rule.learning_rate
    if rule.name == "sgd":
        slots = jax.tree.map(lambda v, g: rule.momentum * v + g, slots, gradients)
        return jax.tree.map(lambda w, v: w - rate * v, weights, slots), slots
    mean, square, time = slots
    time = time + 1
    mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, gradients)
    square = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, square, gradients)
    scale = rate * jnp.sqrt(1 - 0.999**time) / (1 - 0.9**time)
    weights = jax.tree.map(
        lambda w, m, v: w * (1 - rate * rule.weight_decay) - scale * m / (jnp.sqrt(v) + 1e-8), weights, mean, square
    )
    return weights, (mean, square, time)


def _norms(parts: Sequence[Part]) -> Iterator[BatchNorm]:
    for part in parts:
        if isinstance(part, Residual):
            yield from _norms((*part.branch, *part.shortcut))
        elif isinstance(part, BatchNorm):
            yield part


def _apply(
    parts: Sequence[Part],
    weights: Iterator[Any],
    x: Any,
    keep: Callable[[Any], None] = lambda _: None,
    averages: Iterator[Any] | None = None,
) -> Any:
    """Return the parts' output; batch normalizations use `averages`, else the batch's moments, which they keep."""
    for part in parts:
        match part:
            case Dense():
                x = x @ next(weights)
            case Conv():
                around = (part.padding, part.padding)
                x = jax.lax.conv_general_dilated(
                    x, next(weights), (part.stride,) * 2, (around, around), dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
            case BatchNorm():
                mean, variance = next(averages) if averages else (x.mean((0, 1, 2)), x.var((0, 1, 2)))
                keep((mean, variance))
                x = _normalized(x, mean, variance, next(weights), next(weights))
            case LayerNorm():
                mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
                x = _normalized(x, mean, variance, next(weights), next(weights))
            case MaxPool():
                window = (1, part.size, part.size, 1)
                x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "VALID")
            case Flatten():
                x = x.reshape(len(x), -1)
            case GlobalMean():
                x = x.mean((1, 2))
            case Embedding():
                x = next(weights) + next(weights)[x]
            case Attention():
                x = _attention(part, [next(weights) for _ in part.shapes()], x)
            case Residual():
                branch = _apply(part.branch, weights, x, keep, averages)
                x = branch + _apply(part.shortcut, weights, x, keep, averages)
        if isinstance(part, Dense | Conv) and part.use_bias:
            x = x + next(weights)
        activation = getattr(part, "activation", None)
        if activation:
            x = jax.nn.relu(x) if activation == "relu" else jax.nn.gelu(x, approximate=True)
    return x


def _normalized(x: Any, mean: Any, variance: Any, gamma: Any, beta: Any) -> Any:
    return (x - mean) * jax.lax.rsqrt(variance + EPSILON) * gamma + beta


def _attention(part: Attention, weights: list[Any], x: Any) -> Any:
    samples, length, width = x.shape
    split = (x @ weights[0] + weights[1]).reshape(samples, length, 3, part.heads, width // part.heads)
    query, key, value = jnp.moveaxis(split, (2, 3), (0, 2))
    scores = query @ key.swapaxes(-1, -2) / (width // part.heads) ** 0.5
    scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -1e30)
    y = (jax.nn.softmax(scores) @ value).swapaxes(1, 2).reshape(samples, length, width)
    return y @ weights[2] + weights[3]
