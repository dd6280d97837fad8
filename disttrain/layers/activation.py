"""Activations, by name or as functions, and the layer that applies one."""

from collections.abc import Callable
from typing import Any

from disttrain.autodiff import ops
from disttrain.errors import ConfigError, unknown_name
from disttrain.layers.layer import Layer

Function = Callable[[Any], Any]


def linear(x: Any) -> Any:
    """Return `x`."""
    return x


_KNOWN: dict[str, Function] = {
    "elu": ops.elu,
    "exponential": ops.exp,
    "gelu": ops.gelu,
    "leaky_relu": ops.leaky_relu,
    "linear": linear,
    "log_softmax": ops.log_softmax,
    "relu": ops.relu,
    "selu": ops.selu,
    "sigmoid": ops.sigmoid,
    "silu": ops.silu,
    "softmax": ops.softmax,
    "softplus": ops.softplus,
    "swish": ops.silu,
    "tanh": ops.tanh,
}


def get_activation(activation: str | Function | None) -> Function:
    """Return the function of a name; None is the identity, a function itself."""
    if activation is None:
        return linear
    if isinstance(activation, str):
        if activation not in _KNOWN:
            raise unknown_name("activation", activation, _KNOWN)
        return _KNOWN[activation]
    if not callable(activation):
        raise ConfigError(f"an activation is a name, a function or None, not {activation!r}")
    return activation


class Activation(Layer):
    """Applies a function to every element: ``Activation("relu")``. Shape: as the input."""

    supports_masking = True

    def __init__(self, activation: str | Function, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.activation = activation
        self._function = get_activation(activation)

    def call(self, x: Any) -> Any:
        """Return the activation of `x`."""
        return self._function(x)
