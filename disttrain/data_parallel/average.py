"""Average: weights that ranks have changed each by itself become their mean.

What travels is how far each rank has moved from where all stood together, so that it may be compressed as gradients
are. Sources: Stich, "Local SGD converges fast and communicates little", 2019; Basu et al., "Qsparse-local-SGD:
distributed SGD with quantization, sparsification and local computations", 2019.
"""

from collections.abc import Sequence

from disttrain.backend import Array, get_array_module
from disttrain.data_parallel.flat import FlatBuffer
from disttrain.data_parallel.gradients import GradientSum


class Average:
    """The flat buffers of all ranks, and where they stood when they were last the same.

    Args:
        sums: in whose memory the sums are formed; gradients there are lost.
        buffers: the same on all ranks.

    Attributes:
        is_due: whether ranks have moved since; set by who moves them.
    """

    def __init__(self, sums: GradientSum, buffers: Sequence[FlatBuffer]) -> None:
        self.sums = sums
        self.buffers = buffers
        self.common = [buffer.data.copy() for buffer in buffers]
        self.is_due = False

    def take(self, *, exactly: bool = False) -> None:
        """Replace the weights by their mean over the ranks: the same bits on all.

        Args:
            exactly: without compression.
        """
        self.is_due = False
        if self.sums.comm.world_size == 1:
            return  # a difference would round
        for buffer, common, flat in zip(self.buffers, self.common, self.sums.flat, strict=True):
            get_array_module(flat).subtract(buffer.data, common, out=flat)
            flat /= self.sums.comm.world_size
        self.sums.sum_up(exactly=exactly)
        for buffer, common, flat in zip(self.buffers, self.common, self.sums.flat, strict=True):
            common += flat
            buffer.data[...] = common

    def mean(self, arrays: Sequence[Array]) -> None:
        """Replace each of `arrays` by its mean over the ranks."""
        for array in arrays:
            array /= self.sums.comm.world_size
            self.sums.comm.all_reduce(array)
