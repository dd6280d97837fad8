"""Where autodiff and communication meet: gradients summed over ranks while backward still runs.

Parameters live in one flat buffer per dtype, and so do their gradients, in memory of the communicator that sums them.
A Bucket is a slice of the gradients. When the last of them is final its all-reduce starts, in bucket order on every
rank, and goes on while backward does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from disttrain import progress
from disttrain.autodiff import Tensor, op
from disttrain.autodiff.backward import leaves
from disttrain.autodiff.op import tracing
from disttrain.backend import Array, get_array_module
from disttrain.comm import Communicator
from disttrain.comm.arrays import ALIGNMENT, aligned_zeros
from disttrain.comm.base import Pending
from disttrain.observe import log
from disttrain.progress import Phase

BUCKET_BYTES = 1 << 22


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


@dataclass(kw_only=True)
class Bucket:
    """A slice of a flat gradient buffer whose all-reduce is one call.

    Attributes:
        gradient: the slice.
        parameters: those whose gradients lie in it.
        waiting: those of them whose gradients are not final yet in this backward.
        pending: its all-reduce, once started.
    """

    gradient: Array
    parameters: list[Tensor]
    waiting: set[Tensor] = field(default_factory=set)
    pending: Pending | None = None


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


class GradientSum:
    """Sums gradients over the ranks, bucket by bucket, during backward; every rank makes one.

    Args:
        comm: the ranks.
        buffers: where the parameters lie.
        bucket_bytes: size of a bucket, at least one parameter.

    Attributes:
        flat: the gradients, an array for each of `buffers`, laid out as that.
    """

    def __init__(self, comm: Communicator, buffers: Sequence[FlatBuffer], *, bucket_bytes: int = BUCKET_BYTES) -> None:
        self.comm = comm
        self.flat = [_zeros_like(buffer.data, comm) for buffer in buffers]
        laid_out = list(zip(buffers, self.flat, strict=True))
        self.buckets = [b for buffer, flat in laid_out for b in _buckets(buffer, flat, bucket_bytes)]
        self._bucket_of = {p: bucket for bucket in self.buckets for p in bucket.parameters}
        self._view_of = {p: flat[place].reshape(p.shape) for buffer, flat in laid_out for p, place in buffer.places}
        self._warned = False

    def backward(self, loss: Tensor) -> None:
        """Leave in every parameter's `grad` the gradient of the sum of all ranks' losses.

        A parameter that `loss` does not depend on has a gradient of 0; it is named in a warning, once.
        """
        self.begin()
        progress.at(Phase.BACKWARD)
        reached = {loss, *leaves(loss)} if loss.requires_grad else set()  # a parameter may be the loss itself
        unused = [p for p in self._view_of if p not in reached]
        for parameter in unused:
            self.deliver(parameter, 0)
        if unused and not self._warned:
            self._warned = True
            log.warning(
                "the loss does not depend on %s; these parameters get no gradient", ", ".join(p.name for p in unused)
            )
        if loss.requires_grad:
            loss.backward(deliver=self.deliver)
        self.finish()

    def begin(self) -> None:
        """Expect a gradient of every parameter."""
        for bucket in self.buckets:
            bucket.waiting = set(bucket.parameters)
            bucket.pending = None
        self._started = 0

    def deliver(self, parameter: Tensor, gradient: Array) -> None:
        """Put the final gradient of a parameter in its place, and sum up the buckets that are complete."""
        trace = tracing.get()
        if parameter not in self._bucket_of:  # a leaf of the user's own
            parameter.grad = get_array_module(gradient).array(gradient)  # a copy: it may be shared
            if trace is not None:
                trace.refuse("the loss depends on a Tensor that is no weight of the model")
            return
        if trace is not None and hasattr(gradient, "dtype"):
            trace.deliver(parameter, gradient)
        self.home(parameter)[...] = gradient
        self.final(parameter)

    def home(self, parameter: Tensor) -> Array:
        """Return where the gradient of a parameter lies."""
        return self._view_of[parameter]

    def final(self, parameter: Tensor) -> None:
        """Sum up the buckets that are complete, now that the gradient of `parameter` is in its place."""
        bucket = self._bucket_of[parameter]
        parameter.grad = self._view_of[parameter]
        bucket.waiting.discard(parameter)
        # bucket order, not completion order: a different order per rank would mix up the all-reduces
        while self._started < len(self.buckets) and not self.buckets[self._started].waiting:
            following = self.buckets[self._started]
            following.pending = self.comm.start_all_reduce(following.gradient)
            self._started += 1
            progress.at(Phase.BACKWARD, self._started)
        self._advance()

    def finish(self) -> None:
        """Wait until all buckets are summed up over the ranks."""
        for number, bucket in enumerate(self.buckets):
            progress.at(Phase.BUCKET, number)
            assert bucket.pending is not None
            bucket.pending.wait()

    def _advance(self) -> None:
        for bucket in self.buckets[: self._started]:
            assert bucket.pending is not None
            if not bucket.pending.advance():
                return


def total_over(comm: Communicator) -> Callable[[Any], Any]:
    """Return the function that sums an array or Tensor over all ranks of `comm`, differentiably."""
    return lambda x: _all_reduce(x, comm=comm)


@op
def _all_reduce(x: Array, *, comm: Communicator) -> Array:
    return comm.all_reduce(get_array_module(x).array(x))


@_all_reduce.into
def _(x: Array, out: Array, *, comm: Communicator) -> None:
    out[...] = x
    comm.all_reduce(out)


@_all_reduce.vjp
def _(g: Array, _y: Array, _x: Array, *, comm: Communicator) -> tuple[Array, ...]:
    # every rank's loss depends on the sum, and what is differentiated is the sum of all ranks' losses
    return (_all_reduce(g, comm=comm),)


def broadcast_weights(comm: Communicator, weights: Sequence[Tensor]) -> None:
    """Give every rank the values that rank 0 has."""
    for weight in weights:
        comm.broadcast(weight.data)


def _buckets(buffer: FlatBuffer, flat: Array, bucket_bytes: int) -> list[Bucket]:
    """Cut the gradients `flat` into buckets, last parameters first: backward finishes them first."""
    buckets: list[Bucket] = []
    end, held = flat.size, []
    for parameter, place in reversed(buffer.places):
        held.append(parameter)
        if (end - place.start) * flat.itemsize >= bucket_bytes or place.start == 0:
            buckets.append(Bucket(gradient=flat[place.start : end], parameters=held))
            end, held = place.start, []
    return buckets


def _zeros_like(data: Array, comm: Communicator) -> Array:
    """Return zeros for gradients of `data`: in host memory, where `comm` sums them fastest."""
    xp = get_array_module(data)
    return comm.allocate(data.size, data.dtype) if xp is np else xp.zeros(data.size, data.dtype)
