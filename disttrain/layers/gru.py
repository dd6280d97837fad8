"""GRU: a recurrent layer whose output is its memory."""

from disttrain.autodiff import ops
from disttrain.layers.recurrent import Gated


class GRU(Gated):
    """Gated recurrent unit. Shape: ``(samples, steps, n) -> (samples, units)``.

    Its weights are those of Keras's layer with ``reset_after=True``, the default there: ``kernel`` of shape ``(n, 3 *
    units)``, ``recurrent_kernel`` of ``(units, 3 * units)`` and ``bias`` of ``(2, 3 * units)``, one row for each of
    them; for what is kept, what is looked at, and what is new, in this order. Arguments as of every recurrent layer.

    Source: Cho et al., "Learning phrase representations using RNN encoder-decoder", 2014.
    """

    gates = 3
    _whole = ops.gru
    _steps = ops.gru_steps

    def _bias_shape(self) -> tuple[int, ...]:
        return (2, self.gates * self.units)
