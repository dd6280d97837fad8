"""Dense: a matrix product, a bias, an activation."""

from typing import Any

from disttrain.autodiff import ops
from disttrain.errors import ConfigError
from disttrain.initializers import Initializer
from disttrain.layers.activation import Function, get_activation
from disttrain.layers.layer import Layer


class Dense(Layer):
    """Returns ``activation(x @ kernel + bias)``. Shape: ``(..., n) -> (..., units)``.

    Args:
        units: number of outputs.
        activation: a name, a function, or None.
        use_bias: whether a bias is added.
        kernel_initializer: of the kernel, shape ``(n, units)``.
        bias_initializer: of the bias, shape ``(units,)``.
        **kwargs: of every `Layer`.
    """

    min_ndim = 2
    fixed_last_axis = True
    supports_masking = True

    def __init__(
        self,
        units: int,
        activation: str | Function | None = None,
        *,
        use_bias: bool = True,
        kernel_initializer: str | Initializer = "glorot_uniform",
        bias_initializer: str | Initializer = "zeros",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if units < 1:
            raise ConfigError(f"Dense: units must be at least 1, not {units}")
        self.units = units
        self.activation = activation
        self.use_bias = use_bias
        self.kernel_initializer = kernel_initializer
        self.bias_initializer = bias_initializer
        self._function = get_activation(activation)

    def build(self, input_shape: tuple[int, ...]) -> None:
        """Create kernel and bias."""
        self.kernel = self.add_weight("kernel", (input_shape[-1], self.units), self.kernel_initializer)
        self.bias = self.add_weight("bias", (self.units,), self.bias_initializer) if self.use_bias else None

    def call(self, x: Any) -> Any:
        """Return the layer's output."""
        if self._function is ops.relu:
            return ops.dense(x, self.kernel, self.bias, activation="relu")
        return self._function(ops.dense(x, self.kernel, self.bias))
