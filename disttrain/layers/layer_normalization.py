"""Layer normalization: each vector of channels by its own mean and variance."""

from typing import Any

from disttrain.autodiff import ops
from disttrain.errors import ConfigError
from disttrain.layers.layer import Layer


class LayerNormalization(Layer):
    """Normalizes along the last axis to mean `beta` and standard deviation `gamma`. Shape: as the input.

    Args:
        axis: -1, the last; no other is offered.
        epsilon: added to the variance.
        center: whether `beta` is added.
        scale: whether `gamma` multiplies.
        **kwargs: of every `Layer`.

    Source: Ba, Kiros & Hinton, "Layer normalization", 2016.
    """

    min_ndim = 2
    fixed_last_axis = True
    supports_masking = True

    def __init__(
        self, axis: int = -1, epsilon: float = 1e-3, *, center: bool = True, scale: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if axis != -1:
            raise ConfigError(f"LayerNormalization: axis must be -1, the last, not {axis!r}; transpose the input")
        self.axis = axis
        self.epsilon = epsilon
        self.center = center
        self.scale = scale

    def build(self, input_shape: tuple[int, ...]) -> None:
        """Create gamma and beta."""
        shape = input_shape[-1:]
        self.gamma = self.add_weight("gamma", shape, "ones") if self.scale else None
        self.beta = self.add_weight("beta", shape, "zeros") if self.center else None

    def call(self, x: Any) -> Any:
        """Return the normalized input."""
        gamma = 1.0 if self.gamma is None else self.gamma
        beta = 0.0 if self.beta is None else self.beta
        return ops.layer_norm(x, gamma, beta, epsilon=self.epsilon)
