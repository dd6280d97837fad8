"""Buckets: slices of a flat gradient, each summed over the ranks by one call as soon as all of it is final."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from disttrain.autodiff import Tensor
from disttrain.backend import Array
from disttrain.comm.base import Pending
from disttrain.data_parallel.compression import Carrier
from disttrain.data_parallel.flat import FlatBuffer

BUCKET_BYTES = 1 << 22


@dataclass(kw_only=True)
class Bucket:
    """A slice of a flat gradient buffer whose all-reduce is one call.

    Attributes:
        gradient: the slice.
        parameters: those whose gradients lie in it.
        buffer: number of the flat buffer that it is a slice of.
        place: where in that.
        carrier: what its sums travel by, where that is not as they are.
        waiting: those parameters whose gradients are not final yet in this backward.
        pending: its all-reduce, once started.
    """

    gradient: Array
    parameters: list[Tensor]
    buffer: int
    place: slice
    carrier: Carrier | None = None
    waiting: set[Tensor] = field(default_factory=set)
    pending: Pending | None = None

    @functools.cached_property
    def name(self) -> str:
        """What it is, in words."""
        more = f" and {len(self.parameters) - 1} more" if len(self.parameters) > 1 else ""
        return f"gradients of {self.parameters[0].name}{more}"


def cut(number: int, buffer: FlatBuffer, flat: Array, lengths: Sequence[int]) -> list[Bucket]:
    """Cut the gradients `flat` into buckets of so many parameters, from the last parameter to the first."""
    places = buffer.places[::-1]
    buckets, end = [], flat.size
    for first, last in pairwise(accumulate(lengths, initial=0)):
        held = places[first:last]
        whole = slice(held[-1][1].start, end)
        parameters = [parameter for parameter, _ in held]
        buckets.append(Bucket(gradient=flat[whole], parameters=parameters, buffer=number, place=whole))
        end = whole.start
    return buckets


def sizes(buffer: FlatBuffer) -> list[int]:
    """Return the bytes of each parameter's gradient, from the last to the first: backward finishes those first."""
    starts = [place.start for _, place in buffer.places] + [buffer.data.size]
    return [(end - start) * buffer.data.itemsize for start, end in pairwise(starts)][::-1]


def by_size(nbytes: Sequence[int], least: int) -> list[int]:
    """Return the lengths of runs of `nbytes`, in order, each the shortest of `least` in sum; the last may have less."""
    lengths, held, total = [], 0, 0
    for number, size in enumerate(nbytes):
        held, total = held + 1, total + size
        if total >= least or number == len(nbytes) - 1:
            lengths.append(held)
            held, total = 0, 0
    return lengths


def by_timeline(nbytes: Sequence[int], final_s: Sequence[float], cost_s: Callable[[int], float]) -> list[int]:
    """Return the lengths of runs of `nbytes`, in order, with which the last sum is done earliest.

    A run is summed when all of it is final and the run before it has been summed. With few runs the link waits for
    the first of them; with many it pays their latency. By dynamic programming, over where the last run begins.

    Args:
        nbytes: size of each gradient, in the order in which they become final.
        final_s: when each is final.
        cost_s: time of a sum of so many bytes; grows with them.

    Source: Shi, Chu & Li, "MG-WFBP: Efficient data communication for distributed synchronous SGD algorithms", 2019,
    for the model of time; they merge greedily.
    """
    ends = list(accumulate(nbytes, initial=0))
    ready = list(accumulate(final_s, max))
    done, begins = [0.0], [0]
    for last in range(1, len(nbytes) + 1):
        best, begin = float("inf"), 0
        for first in range(last - 1, -1, -1):
            time_s = max(done[first], ready[last - 1]) + cost_s(ends[last] - ends[first])
            if time_s < best:
                best, begin = time_s, first
            if done[first] <= ready[last - 1]:
                break  # an earlier begin only makes the run longer
        done.append(best)
        begins.append(begin)
    lengths, last = [], len(nbytes)
    while last:
        lengths.append(last - begins[last])
        last = begins[last]
    return lengths[::-1]
