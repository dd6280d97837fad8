"""What LSTM and GRU have in common."""

from collections.abc import Callable
from typing import Any

import numpy as np

from disttrain.errors import ConfigError, ShapeError
from disttrain.initializers import Initializer
from disttrain.layers.activation import Function, get_activation
from disttrain.layers.layer import Layer


class Recurrent(Layer):
    """Base of the layers that go through a sequence. Shape: ``(samples, steps, n) -> (samples, units)``.

    Args:
        units: length of an output.
        activation: of what is new in a step; a name or a function.
        recurrent_activation: of gates; a name or a function.
        use_bias: whether biases are added.
        kernel_initializer: of ``kernel``, for the input.
        recurrent_initializer: of ``recurrent_kernel``, for the output of the step before.
        bias_initializer: of ``bias``.
        return_sequences: whether the outputs of all steps are returned, ``(samples, steps, units)``, not of the last.
        **kwargs: of every `Layer`.
    """

    ndim = 3
    fixed_last_axis = True
    gates: int
    _op: Callable[..., Any]

    def __init__(
        self,
        units: int,
        activation: str | Function | None = "tanh",
        recurrent_activation: str | Function | None = "sigmoid",
        *,
        use_bias: bool = True,
        kernel_initializer: str | Initializer = "glorot_uniform",
        recurrent_initializer: str | Initializer = "orthogonal",
        bias_initializer: str | Initializer = "zeros",
        return_sequences: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(units, int | np.integer) or units < 1:
            raise ConfigError(f"{type(self).__name__}: units must be an integer of at least 1, not {units!r}")
        self.units = units
        self.activation = activation
        self.recurrent_activation = recurrent_activation
        self.use_bias = use_bias
        self.kernel_initializer = kernel_initializer
        self.recurrent_initializer = recurrent_initializer
        self.bias_initializer = bias_initializer
        self.return_sequences = return_sequences
        self._functions = {
            "activation": get_activation(activation),
            "recurrent_activation": get_activation(recurrent_activation),
        }

    def build(self, input_shape: tuple[int, ...]) -> None:
        """Create kernels and bias."""
        width = self.gates * self.units
        self.kernel = self.add_weight("kernel", (input_shape[-1], width), self.kernel_initializer)
        self.recurrent_kernel = self.add_weight("recurrent_kernel", (self.units, width), self.recurrent_initializer)
        shape = self._bias_shape()
        self.bias = self.add_weight("bias", shape, self._begin_bias()) if self.use_bias else np.zeros(shape, self.dtype)

    def call(self, x: Any) -> Any:
        """Return the outputs."""
        if x.shape[1] == 0:
            raise ShapeError(
                f"layer {self.path!r} ({type(self).__name__}): expected a step at least, received {x.shape}"
            )
        y = type(self)._op(x, self.kernel, self.recurrent_kernel, self.bias, **self._functions)
        return y if self.return_sequences else y[:, -1]

    def _bias_shape(self) -> tuple[int, ...]:
        return (self.gates * self.units,)

    def _begin_bias(self) -> str | Initializer:
        return self.bias_initializer
