"""Slices: the part of all flat buffers that one rank updates, when the optimizer's state is divided among ranks.

A rank's part of each bucket is the slice of its number, so that reduce-scatter and all-gather move equal parts.
Source: Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter models", 2020, stage 1.
"""

from collections.abc import Sequence

from disttrain.backend import Array, get_array_module
from disttrain.comm.ring import chunk_bounds
from disttrain.data_parallel.flat import FlatBuffer
from disttrain.data_parallel.gradients import GradientSum


class Slices:
    """This rank's slices, one of each bucket.

    Args:
        gradients: that scatters.
        buffers: where the parameters lie.

    Attributes:
        parameters: views of `buffers`.
        gradients: views of the gradients, where their sums arrive.
    """

    def __init__(self, gradients: GradientSum, buffers: Sequence[FlatBuffer]) -> None:
        self.comm = gradients.comm
        self.buckets = gradients.buckets
        self.buffers = buffers
        self.parameters = [self._own(buffers[bucket.buffer].data[bucket.place]) for bucket in self.buckets]
        self.gradients = [self._own(bucket.gradient) for bucket in self.buckets]

    def gather_parameters(self) -> None:
        """Give every rank the parameters that the others have updated: ``(p-1)/p`` of their bytes per rank."""
        parts = [self.buffers[bucket.buffer].data[bucket.place] for bucket in self.buckets]
        for pending in [self.comm.start_all_gather(part) for part in parts]:
            pending.wait()

    def blank(self, slices: Sequence[Array]) -> list[Array]:
        """Return zeros laid out as the buffers, of the dtypes of `slices`, one for each bucket."""
        dtypes = {bucket.buffer: part.dtype for bucket, part in zip(self.buckets, slices, strict=True)}
        return [get_array_module(b.data).zeros(b.data.size, dtypes[i]) for i, b in enumerate(self.buffers)]

    def gather(self, slices: Sequence[Array]) -> list[Array]:
        """Return arrays laid out as the buffers, made of all ranks' `slices`, one for each bucket."""
        whole = self.blank(slices)
        for bucket, part in zip(self.buckets, slices, strict=True):
            of_all = whole[bucket.buffer][bucket.place]
            self._own(of_all)[...] = part
            self.comm.start_all_gather(of_all).wait()
        return whole

    def scatter(self, whole: Sequence[Array], slices: Sequence[Array]) -> None:
        """Fill `slices` from arrays laid out as the buffers: what `gather` returned, on any number of ranks."""
        for bucket, part in zip(self.buckets, slices, strict=True):
            part[...] = self._own(whole[bucket.buffer][bucket.place])

    def _own(self, part: Array) -> Array:
        bounds = chunk_bounds(part.size, self.comm.world_size)
        return part[bounds[self.comm.rank] : bounds[self.comm.rank + 1]]
