"""What a model consists of, in words that every system can build from, and the initial weights of it.

Images are channels last; a kernel has its outputs last. Each part lists its weights in the order of its shapes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

Shape: TypeAlias = tuple[int, ...]
Array: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Dense:
    """``activation(x @ kernel + bias)``; activations are None, "relu" and "gelu" (by tanh)."""

    inputs: int
    units: int
    activation: str | None = None
    use_bias: bool = True

    def shapes(self) -> list[Shape]:
        """Return the shapes of kernel and bias."""
        return [(self.inputs, self.units), (self.units,)][: 1 + self.use_bias]


@dataclass(frozen=True)
class Conv:
    """A convolution with square windows, and `padding` zeros on each of the four sides."""

    channels: int
    filters: int
    size: int
    stride: int = 1
    padding: int = 0
    activation: str | None = None
    use_bias: bool = True

    def shapes(self) -> list[Shape]:
        """Return the shapes of kernel and bias."""
        return [(self.size, self.size, self.channels, self.filters), (self.filters,)][: 1 + self.use_bias]


@dataclass(frozen=True)
class BatchNorm:
    """Batch normalization, moving averages with momentum 0.9 included, and an activation."""

    channels: int
    activation: str | None = None

    def shapes(self) -> list[Shape]:
        """Return the shapes of gamma and beta."""
        return [(self.channels,), (self.channels,)]


@dataclass(frozen=True)
class LayerNorm:
    """Layer normalization over the last axis."""

    width: int

    def shapes(self) -> list[Shape]:
        """Return the shapes of gamma and beta."""
        return [(self.width,), (self.width,)]


@dataclass(frozen=True)
class MaxPool:
    """The maximum of each window of `size` by `size`; windows touch."""

    size: int


@dataclass(frozen=True)
class Flatten:
    """Images of `shape`, channels last, as vectors."""

    shape: tuple[int, int, int]


@dataclass(frozen=True)
class GlobalMean:
    """The mean of each channel."""


@dataclass(frozen=True)
class Embedding:
    """A vector for each token, plus one for its position."""

    vocabulary: int
    width: int
    length: int

    def shapes(self) -> list[Shape]:
        """Return the shapes of the positions' and the tokens' tables."""
        return [(self.length, self.width), (self.vocabulary, self.width)]


@dataclass(frozen=True)
class Attention:
    """Causal self-attention: query, key and value by one product with a bias, the output by another."""

    width: int
    heads: int

    def shapes(self) -> list[Shape]:
        """Return the shapes of kernel and bias of query, key and value side by side, then of the output."""
        return [(self.width, 3 * self.width), (3 * self.width,), (self.width, self.width), (self.width,)]


@dataclass(frozen=True)
class Residual:
    """``activation(branch(x) + shortcut(x))``; without parts the shortcut is `x` itself."""

    branch: tuple["Part", ...]
    shortcut: tuple["Part", ...] = ()
    activation: str | None = None


Part: TypeAlias = (
    Dense | Conv | BatchNorm | LayerNorm | MaxPool | Flatten | GlobalMean | Embedding | Attention | Residual
)
EPSILON = 1e-5  # of normalizations
MOMENTUM = 0.9  # of moving averages


def initial_weights(parts: Sequence[Part], generator: np.random.Generator) -> Iterator[Array]:
    """Yield the initial weights, float32, in the order of the parts; a residual's branch before its shortcut."""
    for part in parts:
        match part:
            case Residual():
                yield from initial_weights((*part.branch, *part.shortcut), generator)
            case BatchNorm() | LayerNorm():
                yield from (f(shape, np.float32) for f, shape in zip((np.ones, np.zeros), part.shapes(), strict=True))
            case Embedding():
                yield from (0.02 * generator.standard_normal(shape, np.float32) for shape in part.shapes())
            case Dense() | Conv() | Attention():
                for shape in part.shapes():
                    # He et al., 2015: a kernel's scale by its inputs; a bias is 0
                    scale = math.sqrt(2 / math.prod(shape[:-1])) if len(shape) > 1 else 0.0
                    yield np.float32(scale) * generator.standard_normal(shape, np.float32)
