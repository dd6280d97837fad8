"""disttrain, by its public path: `compile` with a metric, then `train_on_batch`, `predict` and `fit`."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

import disttrain as dt
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
from benchmarks.shares import Shares
from benchmarks.systems import AbsentError, Built
from benchmarks.workloads import Optimizer, Workload
from disttrain import env
from disttrain.errors import ConfigError
from disttrain.kernels.library import chosen
from disttrain.kernels.precision import PRECISIONS

PACKAGES = ("disttrain", "numpy")
PRECISION = env.matmul_precision() or PRECISIONS[0]


def load() -> None:
    """Load the kernels.

    Raises:
        AbsentError: this machine has not those that the environment asks for.
    """
    try:
        choice = chosen()
    except ConfigError as error:
        raise AbsentError(str(error)) from error
    if env.kernels() not in ("", choice.name):
        raise AbsentError(f"there are no kernels for {env.kernels()}: {choice.reason}")


def variants(workload: Workload, task: str) -> Sequence[str]:
    """Return the kernels that are used: there is one way, the defaults."""
    return (chosen().name,)


def agreed(number: int) -> int:
    """Return rank 0's number."""
    return int(dt.init().broadcast(np.array([number]))[0])


def shares(step: Callable[[], Any], count: int) -> dict[str, float]:
    """Return the shares of computing, communicating, waiting and data in the time of `count` steps."""
    return Shares(dt.init()).of(step, count)


def build(workload: Workload, variant: str) -> Built:
    """Return what the compiled model computes."""
    model = compiled(workload)
    x, y = workload.batch()
    size = len(x)
    epochs = itertools.count()  # so that each has an order of its own

    def epoch(x: Array, y: Array) -> None:
        number = next(epochs)
        model.fit(x, y, batch_size=size, initial_epoch=number, epochs=number + 1, verbose=0)

    return Built(
        parameters=sum(weight.size for weight in model.trainable_weights),
        step=lambda: model.train_on_batch(x, y)["loss"],
        predict=lambda x: model.predict(x, batch_size=size),
        epoch=epoch,
    )


def compiled(workload: Workload, distribution: dt.DataParallel | None = None) -> dt.Model:
    """Return the model with the workload's weights; `distribution` as of `Model.compile`."""
    model = dt.Sequential(_layers(workload.parts))
    loss = dt.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=_optimizer(workload.optimizer), loss=loss, metrics=["accuracy"], distribution=distribution)
    x, _ = workload.batch()
    with dt.no_grad():
        model(x[:0], training=False)  # creates the weights
    for weight, array in zip(model.trainable_weights, _arrays(workload.parts, workload.weights()), strict=True):
        weight.data[...] = array.reshape(weight.shape)  # attention has its heads on an axis of their own
    return model


def product(a: Array, b: Array) -> Array:
    """Return ``a @ b``."""
    result: Array = dt.ops.matmul(a, b)
    return result


def _optimizer(rule: Optimizer) -> Any:
    if rule.name == "sgd":
        return dt.optimizers.SGD(rule.learning_rate, rule.momentum)
    if rule.name == "adamw":
        return dt.optimizers.AdamW(rule.learning_rate, rule.weight_decay)
    return dt.optimizers.Adam(rule.learning_rate)


def _arrays(parts: Sequence[Part], weights: Iterator[Array]) -> Iterator[Array]:
    """Yield the weights as the layers have them: query, key and value apart."""
    for part in parts:
        if isinstance(part, Residual):
            yield from _arrays((*part.branch, *part.shortcut), weights)
        elif isinstance(part, Attention):
            for kernel, bias in zip(np.split(next(weights), 3, axis=1), np.split(next(weights), 3), strict=True):
                yield kernel
                yield bias
            yield from itertools.islice(weights, 2)
        elif isinstance(part, Dense | Conv | BatchNorm | LayerNorm | Embedding):
            yield from itertools.islice(weights, len(part.shapes()))


def _layers(parts: Sequence[Part]) -> list[dt.Layer]:
    return [layer for part in parts for layer in _layers_of(part)]


def _layers_of(part: Part) -> list[dt.Layer]:
    match part:
        case Dense():
            return [dt.layers.Dense(part.units, _activation(part.activation), use_bias=part.use_bias)]
        case Conv():
            return [_Conv(part)]
        case BatchNorm():
            norm = dt.layers.BatchNormalization(momentum=MOMENTUM, epsilon=EPSILON)
            return [norm, dt.layers.Activation(_activation(part.activation))] if part.activation else [norm]
        case LayerNorm():
            return [dt.layers.LayerNormalization(epsilon=EPSILON)]
        case MaxPool():
            return [dt.layers.MaxPooling2D(part.size)]
        case Flatten():
            return [dt.layers.Flatten()]
        case GlobalMean():
            return [dt.layers.GlobalAveragePooling2D()]
        case Embedding():
            return [_Embedding(part)]
        case Attention():
            return [_Attention(part)]
        case Residual():
            return [_Residual(part)]


def _activation(name: str | None) -> Any:
    if name == "gelu":
        return lambda x: dt.ops.gelu(x, approximate=True)
    return name or "linear"


class _Conv(dt.layers.Conv2D):
    """A convolution whose padding is the same on all sides, which "same" is not where the stride is 2."""

    def __init__(self, part: Conv) -> None:
        super().__init__(
            part.filters, part.size, part.stride, activation=_activation(part.activation), use_bias=part.use_bias
        )
        self.part = part

    def call(self, x: Any) -> Any:
        if self.part.stride == 1 and 2 * self.part.padding == self.part.size - 1:
            self.padding = "same"  # the layer as it is
        elif self.part.padding:
            around = (self.part.padding, self.part.padding)
            return dt.ops.conv2d(x, self.kernel, strides=self.strides, padding=(around, around))
        return super().call(x)


class _Embedding(dt.Layer):
    autocast = False  # tokens stay integers

    def __init__(self, part: Embedding) -> None:
        super().__init__()
        self.part = part
        self.tokens = dt.layers.Embedding(part.vocabulary, part.width)

    def build(self, input_shape: tuple[int, ...]) -> None:
        self.positions = self.add_weight("positions", (self.part.length, self.part.width))

    def call(self, x: Any) -> Any:
        return self.tokens(x) + self.positions


class _Attention(dt.Layer):
    def __init__(self, part: Attention) -> None:
        super().__init__()
        self.part = part
        self.heads = dt.layers.MultiHeadAttention(part.heads, part.width // part.heads)

    def call(self, x: Any) -> Any:
        return self.heads(x, x, use_causal_mask=True)


class _Residual(dt.Layer):
    def __init__(self, part: Residual) -> None:
        super().__init__()
        self.part = part
        self.branch = _layers(part.branch)
        self.shortcut = _layers(part.shortcut)
        self.activation = dt.layers.Activation(_activation(part.activation))

    def call(self, x: Any) -> Any:
        y = x
        for layer in self.branch:
            y = layer(y)
        for layer in self.shortcut:
            x = layer(x)
        y = y + x
        return self.activation(y) if self.part.activation else y
