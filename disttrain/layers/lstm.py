"""LSTM: a recurrent layer with a memory that gates write to, clear and read."""

from typing import Any

import numpy as np

from disttrain import initializers
from disttrain.autodiff import ops
from disttrain.initializers import Initializer
from disttrain.layers.recurrent import Gated


class LSTM(Gated):
    """Long short-term memory. Shape: ``(samples, steps, n) -> (samples, units)``.

    Its weights are those of Keras's layer: ``kernel`` of shape ``(n, 4 * units)``, ``recurrent_kernel`` of
    ``(units, 4 * units)`` and ``bias`` of ``(4 * units,)``, for what is written, kept, new, and read, in this order.

    Args:
        *args: as of every recurrent layer.
        unit_forget_bias: whether the bias of what is kept begins as 1.
        **kwargs: as of every recurrent layer.

    Sources: Hochreiter & Schmidhuber, "Long short-term memory", 1997; for the bias of 1 Jozefowicz, Zaremba &
    Sutskever, "An empirical exploration of recurrent network architectures", 2015.
    """

    gates = 4
    states = 2
    _whole = ops.lstm
    _steps = ops.lstm_steps

    def __init__(self, *args: Any, unit_forget_bias: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.unit_forget_bias = unit_forget_bias

    def _begin_bias(self) -> str | Initializer:
        if not self.unit_forget_bias:
            return self.bias_initializer
        begin = initializers.get(self.bias_initializer)

        def with_ones(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
            first, last = begin(generator, (self.units,)), begin(generator, (2 * self.units,))
            return np.concatenate([first, np.ones(self.units), last])

        return with_ones
