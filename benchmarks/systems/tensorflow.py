"""TensorFlow: the whole step as one `tf.function`, with its fused optimizers; the best of graph and XLA."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported

import numpy as np
import tensorflow as tf

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

PACKAGES = ("tensorflow",)
PRECISION = "float32"

tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(1)


def variants(workload: Workload, task: str) -> Sequence[str]:
    """Return "graph" and "xla"."""
    return ("graph", "xla")


def build(workload: Workload, variant: str) -> Built:
    """Return the model: a traced step, a traced prediction."""
    inputs, targets = workload.batch()
    x, y = tf.constant(inputs), tf.constant(targets)
    weights = [tf.Variable(array) for array in workload.weights()]
    averages = [tf.Variable(start) for n in _norms(workload.parts) for start in (tf.zeros(n), tf.ones(n))]
    update = _rule(workload.optimizer, weights)

    def step_on(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            logits = _apply(workload.parts, iter(weights), x, iter(averages), trains=True)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=logits)
            loss = tf.reduce_mean(losses)
        update(tape.gradient(loss, weights))
        return loss

    def logits_of(x: Any) -> Any:
        return _apply(workload.parts, iter(weights), x, iter(averages), trains=False)

    train = tf.function(step_on, jit_compile=variant == "xla", autograph=False)
    forward = tf.function(logits_of, jit_compile=variant == "xla", autograph=False)
    size = len(inputs)

    def predict(x: Array) -> Array:
        return np.concatenate([forward(tf.constant(x[at : at + size])) for at in range(0, len(x), size)])

    generator = np.random.default_rng(0)

    def epoch(x: Array, y: Array) -> None:
        order = generator.permutation(len(x))
        for rows in np.split(order, range(size, len(x), size)):
            train(tf.constant(x[rows]), tf.constant(y[rows]))

    return Built(
        parameters=sum(int(tf.size(weight)) for weight in weights),
        step=lambda: train(x, y).numpy(),
        predict=predict,
        epoch=epoch,
    )


def product(a: Array, b: Array) -> Array:
    """Return ``a @ b``."""
    result: Array = tf.function(tf.matmul, autograph=False)(tf.constant(a), tf.constant(b)).numpy()
    return result


def _rule(rule: Optimizer, weights: list[Any]) -> Any:
    """Return the function that changes the weights by their gradients."""
    rate = rule.learning_rate
    slots = [(tf.Variable(tf.zeros_like(w)), tf.Variable(tf.zeros_like(w))) for w in weights]
    powers = tf.Variable(1.0), tf.Variable(1.0)

    def sgd(gradients: list[Any]) -> None:
        for w, g, (velocity, _) in zip(weights, gradients, slots, strict=True):
            tf.raw_ops.ResourceApplyMomentum(
                var=w.handle, accum=velocity.handle, lr=rate, grad=tf.convert_to_tensor(g), momentum=rule.momentum
            )

    def adam(gradients: list[Any]) -> None:
        powers[0].assign(powers[0] * 0.9)
        powers[1].assign(powers[1] * 0.999)
        for w, g, (mean, square) in zip(weights, gradients, slots, strict=True):
            if rule.weight_decay:
                w.assign(w * (1 - rate * rule.weight_decay))
            tf.raw_ops.ResourceApplyAdam(
                var=w.handle,
                m=mean.handle,
                v=square.handle,
                beta1_power=powers[0],
                beta2_power=powers[1],
                lr=rate,
                beta1=0.9,
                beta2=0.999,
                epsilon=1e-8,
                grad=tf.convert_to_tensor(g),
            )

    return sgd if rule.name == "sgd" else adam


def _norms(parts: Sequence[Part]) -> Iterator[int]:
    """Yield the channels of each batch normalization."""
    for part in parts:
        if isinstance(part, Residual):
            yield from _norms((*part.branch, *part.shortcut))
        elif isinstance(part, BatchNorm):
            yield part.channels


def _apply(parts: Sequence[Part], weights: Iterator[Any], x: Any, averages: Iterator[Any], *, trains: bool) -> Any:
    """Return the parts' output; batch normalizations move their averages where the model trains, else use them."""
    for part in parts:
        match part:
            case Dense():
                shape = tf.concat([tf.shape(x)[:-1], [part.units]], 0)
                x = tf.reshape(tf.matmul(tf.reshape(x, (-1, part.inputs)), next(weights)), shape)
            case Conv():
                around = [part.padding, part.padding]
                x = tf.nn.conv2d(x, next(weights), part.stride, [[0, 0], around, around, [0, 0]])
            case BatchNorm():
                of_batches = next(averages), next(averages)
                given = {} if trains else dict(zip(("mean", "variance"), of_batches, strict=True))
                x, *moments = tf.compat.v1.nn.fused_batch_norm(
                    x, next(weights), next(weights), epsilon=EPSILON, is_training=trains, **given
                )
                if trains:
                    for average, moment in zip(of_batches, moments, strict=True):
                        average.assign_sub((1 - MOMENTUM) * (average - moment))
            case LayerNorm():
                mean, variance = tf.nn.moments(x, -1, keepdims=True)
                gamma, beta = next(weights), next(weights)
                x = tf.nn.batch_normalization(x, mean, variance, beta, gamma, EPSILON)
            case MaxPool():
                x = tf.nn.max_pool2d(x, part.size, part.size, "VALID")
            case Flatten():
                x = tf.reshape(x, (x.shape[0], -1))
            case GlobalMean():
                x = tf.reduce_mean(x, (1, 2))
            case Embedding():
                x = next(weights) + tf.gather(next(weights), x)
            case Attention():
                x = _attention(part, [next(weights) for _ in part.shapes()], x)
            case Residual():
                branch = _apply(part.branch, weights, x, averages, trains=trains)
                x = branch + _apply(part.shortcut, weights, x, averages, trains=trains)
        if isinstance(part, Dense | Conv) and part.use_bias:
            x = tf.nn.bias_add(x, next(weights))
        activation = getattr(part, "activation", None)
        if activation:
            x = tf.nn.relu(x) if activation == "relu" else tf.nn.gelu(x, approximate=True)
    return x


def _attention(part: Attention, weights: list[Any], x: Any) -> Any:
    samples, length, width = x.shape
    split = tf.matmul(tf.reshape(x, (-1, width)), weights[0]) + weights[1]
    split = tf.reshape(split, (samples, length, 3, part.heads, width // part.heads))
    query, key, value = tf.unstack(tf.transpose(split, (2, 0, 3, 1, 4)))
    scores = tf.matmul(query, key, transpose_b=True) / (width // part.heads) ** 0.5
    visible = tf.linalg.band_part(tf.ones((length, length), tf.bool), -1, 0)
    y = tf.matmul(tf.nn.softmax(tf.where(visible, scores, -1e30)), value)
    y = tf.matmul(tf.reshape(tf.transpose(y, (0, 2, 1, 3)), (-1, width)), weights[2]) + weights[3]
    return tf.reshape(y, (samples, length, width))
