"""Parameters live in one flat buffer per dtype: what all ranks change alike is one array, or a slice of one."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from disttrain.autodiff import Tensor
from disttrain.backend import Array, get_array_module
from disttrain.comm.arrays import ALIGNMENT, aligned_zeros


@dataclass(kw_only=True)
class FlatBuffer:
    """All parameters of one dtype end to end; each begins at a multiple of 64 bytes.

    Attributes:
        data: shape ``(n,)``; the parameters' arrays are views of it, and what lies between them is 0.
        places: for each parameter, in order, where it lies.
    """

    data: Array
    places: list[tuple[Tensor, slice]]

    def split(self, flat: Array) -> dict[str, Array]:
        """Return views of `flat`, an array laid out as this buffer, by the names of the parameters."""
        return {p.name: flat[place].reshape(p.shape) for p, place in self.places}


def flatten(parameters: Sequence[Tensor]) -> list[FlatBuffer]:
    """Move `parameters` into flat buffers, one per dtype; their arrays become views, their values stay."""
    buffers = []
    for dtype in sorted({str(p.dtype) for p in parameters}):
        chosen = [p for p in parameters if str(p.dtype) == dtype]
        xp = get_array_module(chosen[0].data)
        step = ALIGNMENT // chosen[0].data.itemsize
        places, end = [], 0
        for parameter in chosen:
            places.append((parameter, slice(end, end + parameter.size)))
            end += -(-parameter.size // step) * step
        # device memory is aligned further than to a cache line
        data = aligned_zeros(end, xp.dtype(dtype)) if xp is np else xp.zeros(end, dtype)
        buffer = FlatBuffer(data=data, places=places)
        for parameter, place in places:
            view = buffer.data[place].reshape(parameter.shape)
            view[...] = parameter.data
            parameter.data = view
        buffers.append(buffer)
    return buffers
