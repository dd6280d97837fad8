"""Bidirectional: a recurrent layer that goes forwards, and another one that goes backwards."""

from collections.abc import Callable
from typing import Any

from disttrain.autodiff import ops
from disttrain.errors import ConfigError
from disttrain.layers.layer import Layer
from disttrain.layers.recurrent import Recurrent

_MERGE: dict[str, Callable[[Any, Any], Any]] = {
    "concat": lambda a, b: ops.concatenate([a, b], axis=-1),
    "sum": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "ave": lambda a, b: (a + b) / 2,
}


class Bidirectional(Layer):
    """Goes through sequences in both directions. Shape: ``(samples, steps, n) -> (samples, 2 * units)``.

    As in Keras the layers are called ``forward_...`` and ``backward_...``; they are made of the arguments of `layer`,
    which itself is not used. Outputs stand at the steps that they are of, and are 0 at steps that a mask leaves out.

    Args:
        layer: a recurrent layer, whose arguments both have.
        merge_mode: how their outputs become one: ``"concat"``, ``"sum"``, ``"mul"``, ``"ave"``; None: both are
            returned.
        backward_layer: that goes in the other direction; by default as `layer`.
        **kwargs: of every `Layer`.

    Source: Schuster & Paliwal, "Bidirectional recurrent neural networks", 1997.
    """

    ndim = 3
    fixed_last_axis = True

    def __init__(
        self,
        layer: Recurrent,
        merge_mode: str | None = "concat",
        *,
        backward_layer: Recurrent | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for each in (layer, backward_layer or layer):
            if not isinstance(each, Recurrent):
                raise ConfigError(f"Bidirectional: expected a recurrent layer, as LSTM(32), received {each!r}")
        if merge_mode is not None and merge_mode not in _MERGE:
            raise ConfigError(f"Bidirectional: merge_mode is one of {', '.join(_MERGE)} or None, not {merge_mode!r}")
        self.merge_mode = merge_mode
        self.forward_layer = _again(layer, "forward", go_backwards=layer.go_backwards)
        self.backward_layer = _again(
            backward_layer or layer,
            "backward",
            go_backwards=not layer.go_backwards if backward_layer is None else backward_layer.go_backwards,
        )
        self._check_alike()

    @property
    def layer(self) -> Recurrent:
        """The one that is made of the argument of this name: `forward_layer`."""
        return self.forward_layer

    def call(self, x: Any, initial_state: Any = None, mask: Any = None) -> Any:
        """Return the outputs; arguments as of the layers.

        Args:
            x: sequences.
            initial_state: of the one that is `layer`, then of the other, in one list.
            mask: which steps count.

        Returns:
            The output, or two of them without a `merge_mode`; with ``return_state`` a tuple that goes on with the
            states of `layer`, then of the other.
        """
        half = self.forward_layer.states
        begins = [None, None] if initial_state is None else [initial_state[:half], initial_state[half:]]
        found: list[tuple[Any, list[Any]]] = []
        for layer, begin in zip((self.forward_layer, self.backward_layer), begins, strict=True):
            y = layer(x, initial_state=begin, mask=mask)
            y, *states = y if layer.return_state else (y,)
            if layer.return_sequences and layer.go_backwards:
                y = ops.flip(y, axis=1)
            found.append((y, states))
        (one, its), (other, others) = found
        made = (one, other) if self.merge_mode is None else (_MERGE[self.merge_mode](one, other),)
        return (*made, *its, *others) if self.forward_layer.return_state or len(made) > 1 else made[0]

    def compute_mask(self, x: Any, mask: Any = None) -> Any:
        """Return the mask of the input if there is an output for each of its steps."""
        return mask if self.forward_layer.return_sequences else None

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this layer again, the layers as class and arguments."""
        layers = {"layer": self.forward_layer, "backward_layer": self.backward_layer}
        described = {key: {"class": type(held).__name__, "config": held.get_config()} for key, held in layers.items()}
        return {**super().get_config(), **described}

    def _check_alike(self) -> None:
        one, other = self.forward_layer, self.backward_layer
        for name in ("return_sequences", "return_state", "go_backwards"):
            mine, its = getattr(one, name), getattr(other, name)
            if (mine == its) is (name == "go_backwards"):
                raise ConfigError(
                    f"Bidirectional: {name} is {mine} in layer and {its} in backward_layer; they must have "
                    f"{'opposite directions' if name == 'go_backwards' else 'the same'}"
                )


def _again(layer: Recurrent, direction: str, *, go_backwards: bool) -> Recurrent:
    """Return a new layer of the arguments of `layer`."""
    config = layer.get_config()
    name = (layer.name or type(layer).__name__.lower()).removeprefix(f"{direction}_")
    changed = {"go_backwards": go_backwards, "zero_output_for_mask": layer.return_sequences}
    return type(layer)(**{**config, **changed, "name": f"{direction}_{name}", "input_shape": None})
