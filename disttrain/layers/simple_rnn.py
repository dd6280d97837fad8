"""SimpleRNN: a recurrent layer without gates."""

from disttrain.autodiff import ops
from disttrain.layers.recurrent import Recurrent


class SimpleRNN(Recurrent):
    """Returns ``h = activation(x @ kernel + h @ recurrent_kernel + bias)``, in which h is that of the step before.

    Shape: ``(samples, steps, n) -> (samples, units)``. Its weights are those of Keras's layer: ``kernel`` of shape
    ``(n, units)``, ``recurrent_kernel`` of ``(units, units)`` and ``bias`` of ``(units,)``. Arguments as of every
    recurrent layer.

    Source: Elman, "Finding structure in time", 1990.
    """

    gates = 1
    _steps = ops.rnn_steps
