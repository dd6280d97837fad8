"""Sequential: layers one after the other."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from disttrain.autodiff import no_grad
from disttrain.errors import ConfigError, ShapeError, readable
from disttrain.layers import Layer
from disttrain.layers.layer import numbered_names
from disttrain.training.model import Model


class Sequential(Model):
    """A model that passes its input through `layers` in their order.

    It is built, that is has weights, as soon as the shape of its input is known: at once if the first layer
    was given ``input_shape``, else at its first call.

    Args:
        layers: to begin with.
        **kwargs: of every `Layer`.
    """

    def __init__(self, layers: Sequence[Layer] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.layers: list[Layer] = []
        for layer in layers:
            self._append(layer)
        self._build_if_known()

    def add(self, layer: Layer) -> None:
        """Append a layer."""
        if self._built_for is not None and self.input_shape is None:
            raise ConfigError("the model was built by its first call; add all layers before it")
        self._append(layer)
        self._build_if_known()
        self._forget_replicas()  # it knows the weights that were there

    def call(self, x: Any) -> Any:
        """Return what the last layer gives."""
        for layer in self.layers:
            x = layer(x)
        return x

    def sublayers(self) -> list[tuple[str, Layer]]:
        """Return the layers with names: their own, or their classes', numbered from the second on."""
        return list(zip(numbered_names(self.layers), self.layers, strict=True))

    def get_config(self) -> dict[str, Any]:
        """Return the layers' classes and arguments."""
        layers = [{"class": type(layer).__name__, "config": layer.get_config()} for layer in self.layers]
        return {**super().get_config(), "layers": layers}

    def _append(self, layer: Layer) -> None:
        if not isinstance(layer, Layer):
            raise ConfigError(f"Sequential takes layers, not {layer!r}; a function goes into Activation(function)")
        if not self.layers and self.input_shape is None:
            self.input_shape = layer.input_shape
        self.layers.append(layer)

    def _build_if_known(self) -> None:
        if self.input_shape is not None and self.layers:
            self._built_for = None
            with no_grad():
                self(np.zeros((0, *self.input_shape), self.dtype), training=False)

    def _received(self, x: Any) -> Any:
        if not self.layers:
            raise ConfigError("this Sequential has no layers; add() some")
        x = super()._received(x)
        if self.input_shape is not None and tuple(x.shape[1:]) != self.input_shape:
            raise ShapeError(
                f"layer {self.sublayers()[0][0]!r} ({type(self.layers[0]).__name__}), the model's first: expected an "
                f"input of shape {readable((None, *self.input_shape))}, received {readable(x.shape)}"
            )
        return x
