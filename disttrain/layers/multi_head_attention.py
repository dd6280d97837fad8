"""MultiHeadAttention: several attentions side by side, each to projections of its own."""

from typing import Any

import numpy as np

from disttrain.autodiff import Tensor, ops
from disttrain.autodiff.op import array_of
from disttrain.errors import ConfigError, ShapeError
from disttrain.initializers import Initializer
from disttrain.layers.dropout import Dropout
from disttrain.layers.layer import Layer


class MultiHeadAttention(Layer):
    """Returns for each query what it finds in the values: ``layer(query, value, key=None, ...)``; see `call`.

    Shapes: ``(samples, queries, n), (samples, keys, m) -> (samples, queries, output_shape)``.

    Its weights are those of Keras's layer, in name, shape and order: ``query/kernel`` of shape
    ``(n, num_heads, key_dim)``, ``query/bias`` of ``(num_heads, key_dim)``, the same for ``key`` and ``value``, and
    ``attention_output/kernel`` of ``(num_heads, value_dim, output_shape)`` with its bias.

    Args:
        num_heads: number of attentions.
        key_dim: length of a head's queries and keys.
        value_dim: length of a head's values; by default `key_dim`.
        dropout: share of the weights of values that are set to 0 while training.
        use_bias: whether projections add a bias.
        output_shape: length of an output; by default that of a query.
        kernel_initializer: of the kernels.
        bias_initializer: of the biases.
        **kwargs: of every `Layer`.

    Source: Vaswani et al., "Attention is all you need", 2017.
    """

    ndim = 3
    fixed_last_axis = True

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        dropout: float = 0.0,
        *,
        use_bias: bool = True,
        output_shape: int | None = None,
        kernel_initializer: str | Initializer = "glorot_uniform",
        bias_initializer: str | Initializer = "zeros",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        sizes = {"num_heads": num_heads, "key_dim": key_dim, "value_dim": value_dim, "output_shape": output_shape}
        for name, size in sizes.items():
            if size is not None and (not isinstance(size, int | np.integer) or size < 1):
                raise ConfigError(f"MultiHeadAttention: {name} must be an integer of at least 1, not {size!r}")
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.value_dim = key_dim if value_dim is None else value_dim
        self.dropout = dropout
        self.use_bias = use_bias
        self.kernel_initializer = kernel_initializer
        self.bias_initializer = bias_initializer
        self._output_dim = output_shape  # `output_shape` is what every layer has after a call
        self._dropout = Dropout(dropout, name="dropout", dtype=self.dtype)

    def build(
        self,
        input_shape: tuple[int, ...],
        value_shape: tuple[int, ...] | None = None,
        key_shape: tuple[int, ...] | None = None,
    ) -> None:
        """Create kernels and biases; values are by default as long as queries, keys as values."""
        value_shape = value_shape or input_shape
        self._lengths = {"value": value_shape[-1], "key": (key_shape or value_shape)[-1]}
        heads = (self.num_heads, self.key_dim)
        self._add("query", (input_shape[-1], *heads), heads)
        self._add("key", (self._lengths["key"], *heads), heads)
        self._add("value", (self._lengths["value"], self.num_heads, self.value_dim), (self.num_heads, self.value_dim))
        output_dim = self._output_dim or input_shape[-1]
        self._add("attention_output", (self.num_heads, self.value_dim, output_dim), (output_dim,))

    def call(
        self,
        query: Any,
        value: Any,
        key: Any = None,
        attention_mask: Any = None,
        return_attention_scores: bool = False,
        training: bool = False,
        use_causal_mask: bool = False,
    ) -> Any:
        """Return the layer's output; a pair of it and the weights of values if `return_attention_scores`.

        Args:
            query: shape ``(samples, queries, n)``.
            value: shape ``(samples, keys, m)``.
            key: as many as values; by default the values.
            attention_mask: bool or 0 and 1, shape ``(queries, keys)``, ``(samples, queries, keys)`` or with heads
                before queries: where it is 0 a query does not see a key.
            return_attention_scores: also return the weights, before dropout: ``(samples, heads, queries, keys)``.
            training: whether weights of values are dropped.
            use_causal_mask: whether a query sees the keys up to its own place only.
        """
        value = self._further("value", value, query.shape[0])
        key = value if key is None else self._further("key", key, query.shape[0], value.shape[1])
        seen = {"mask": self._mask(attention_mask, query, key), "causal": use_causal_mask}
        q, k, v = (self._projected(name, x) for name, x in (("query", query), ("key", key), ("value", value)))
        if return_attention_scores or (training and self.dropout):
            q, k, v = self._apart(q), self._apart(k), self._apart(v)
            scores = ops.attention_weights(q, k, **seen)
            y = (self._dropout(scores) @ v).transpose(0, 2, 1, 3)
            y = y.reshape(*query.shape[:2], self.num_heads * self.value_dim)
            y = self._projected("attention_output", y)
            return (y, scores) if return_attention_scores else y
        y = ops.attention_of_heads(q, k, v, heads=self.num_heads, **seen)
        return self._projected("attention_output", y)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this layer again."""
        return {**super().get_config(), "output_shape": self._output_dim}

    def _build_for(self, x: Any, *args: Any, **kwargs: Any) -> None:
        inputs = dict(zip(("value", "key"), args, strict=False)) | kwargs
        value, key = (inputs.get(name) for name in ("value", "key"))
        self.build(x.shape, np.shape(array_of(value)), None if key is None else np.shape(array_of(key)))

    def _add(self, name: str, kernel: tuple[int, ...], bias: tuple[int, ...]) -> None:
        self.add_weight(f"{name}/kernel", kernel, self.kernel_initializer)
        if self.use_bias:
            self.add_weight(f"{name}/bias", bias, self.bias_initializer)

    def _projected(self, name: str, x: Any) -> Any:
        """Return ``x @ kernel + bias``, heads side by side on one axis: ``(samples, steps, n or all heads)``."""
        kernel = self._own_weights[f"{name}/kernel"][0].reshape(x.shape[-1], -1)
        return ops.dense(x, kernel, self._own_weights[f"{name}/bias"][0].reshape(-1) if self.use_bias else None)

    def _apart(self, x: Any) -> Any:
        """Return heads that lie side by side on an axis of their own: ``(samples, heads, steps, length)``."""
        return x.reshape(*x.shape[:2], self.num_heads, x.shape[2] // self.num_heads).transpose(0, 2, 1, 3)

    def _further(self, name: str, x: Any, samples: int, steps: int | None = None) -> Any:
        """Return a further input as a Tensor of the layer's dtype, or say what is wrong with its shape."""
        x = x if isinstance(x, Tensor) else Tensor(x if hasattr(x, "dtype") else np.asarray(x))
        length = self._lengths[name]
        if x.ndim != 3 or x.shape != (samples, x.shape[1] if steps is None else steps, length):
            raise ShapeError(
                f"layer {self.path!r} (MultiHeadAttention): expected a {name} of shape "
                f"({samples}, {'steps' if steps is None else steps}, {length}), received {x.shape}"
            )
        return x if x.dtype == self.dtype else ops.cast(x, dtype=self.dtype)

    def _mask(self, mask: Any, query: Any, key: Any) -> Any:
        """Return the mask with an axis for heads, or say what is wrong with it."""
        if mask is None:
            return None
        mask = mask if hasattr(mask, "dtype") else np.asarray(mask)
        full = (query.shape[0], self.num_heads, query.shape[1], key.shape[1])
        if mask.ndim == 3:
            mask = ops.reshape(mask, shape=(mask.shape[0], 1, *mask.shape[1:]))
        try:
            fits = np.broadcast_shapes(mask.shape, full) == full
        except ValueError:
            fits = False
        if not fits or mask.dtype.kind not in "biu":
            raise ShapeError(
                f"layer {self.path!r} (MultiHeadAttention): expected an attention_mask of bool or integers that "
                f"broadcasts to (samples, heads, queries, keys) = {full}, received {mask.dtype} {mask.shape}"
            )
        return mask
