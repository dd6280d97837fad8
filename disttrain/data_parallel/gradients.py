"""Gradients summed over the ranks while backward still runs.

They lie in flat buffers, as the parameters do, in memory of the communicator that sums them. A Bucket is a slice of
them. When the last of them is final its all-reduce starts, in bucket order on every rank, and goes on while backward
does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from disttrain import progress
from disttrain.autodiff import Tensor
from disttrain.autodiff.backward import leaves
from disttrain.autodiff.op import tracing
from disttrain.backend import Array, get_array_module
from disttrain.comm import Communicator
from disttrain.comm.base import Pending
from disttrain.data_parallel.flat import FlatBuffer
from disttrain.observe import log
from disttrain.progress import Phase

BUCKET_BYTES = 1 << 22


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
        self.buckets = [b for buffer, flat in laid_out for b in cut(buffer, flat, bucket_bytes)]
        self._bucket_of = {p: bucket for bucket in self.buckets for p in bucket.parameters}
        self._view_of = views(buffers, self.flat)
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
            self.buckets[self._started].pending = self.start(self._started)
            self._started += 1
            progress.at(Phase.BACKWARD, self._started)
        self._advance()

    def start(self, number: int) -> Pending:
        """Start to sum up a bucket, by its number, over the ranks."""
        return self.comm.start_all_reduce(self.buckets[number].gradient)

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


def views(buffers: Sequence[FlatBuffer], flats: Sequence[Array]) -> dict[Tensor, Array]:
    """Return, for each parameter, its part of `flats`, arrays laid out as `buffers`."""
    laid_out = zip(buffers, flats, strict=True)
    return {p: flat[place].reshape(p.shape) for buffer, flat in laid_out for p, place in buffer.places}


def cut(buffer: FlatBuffer, flat: Array, bucket_bytes: int) -> list[Bucket]:
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
