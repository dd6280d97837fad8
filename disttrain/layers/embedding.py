"""Embedding: a trained vector for each of a number of things."""

from typing import Any

from disttrain.autodiff import ops
from disttrain.autodiff.ops import elementwise
from disttrain.errors import ConfigError
from disttrain.initializers import Initializer
from disttrain.layers.layer import Layer


class Embedding(Layer):
    """Returns the vector of each index. Shape: ``(samples, ...) -> (samples, ..., output_dim)``.

    Args:
        input_dim: number of vectors; indices count from 0 to below it.
        output_dim: length of a vector.
        embeddings_initializer: of the vectors, shape ``(input_dim, output_dim)``.
        mask_zero: whether the index 0 stands for nothing: recurrent layers that follow leave it out.
        **kwargs: of every `Layer`.
    """

    autocast = False  # an index may be larger than the integers that a float holds

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        embeddings_initializer: str | Initializer = "uniform",
        *,
        mask_zero: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, size in (("input_dim", input_dim), ("output_dim", output_dim)):
            if size < 1:
                raise ConfigError(f"Embedding: {name} must be at least 1, not {size}")
        self.input_dim = input_dim
        self.output_dim = output_dim
        self.embeddings_initializer = embeddings_initializer
        self.mask_zero = mask_zero

    def build(self, input_shape: tuple[int, ...]) -> None:
        """Create the vectors."""
        self.embeddings = self.add_weight(
            "embeddings",
            (self.input_dim, self.output_dim),
            self.embeddings_initializer,
        )

    def call(self, x: Any) -> Any:
        """Return the vectors; an index that has none is a DataError which names the layer and the sample."""
        return ops.embedding(x, self.embeddings, name=f"layer {self.path!r} (Embedding)")

    def compute_mask(self, x: Any, mask: Any = None) -> Any:
        """Return where `x` is not 0, if 0 stands for nothing."""
        return elementwise.not_equal(x, 0) if self.mask_zero else None
