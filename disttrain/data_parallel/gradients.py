"""Gradients summed over the ranks while backward still runs.

They lie in flat buffers, as the parameters do, in memory of the communicator that sums them. A Bucket is a slice of
them. When the last of them is final its all-reduce starts, in bucket order on every rank, and goes on while backward
does.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np

from disttrain import progress
from disttrain.autodiff import Tensor
from disttrain.autodiff.backward import leaves
from disttrain.autodiff.op import tracing
from disttrain.backend import Array, get_array_module
from disttrain.comm import Communicator
from disttrain.comm.pending import DONE, HostArray, Pending
from disttrain.data_parallel.buckets import BUCKET_BYTES, Bucket, by_size, by_timeline, cut, sizes
from disttrain.data_parallel.compression import Carrier, Compression, Part
from disttrain.data_parallel.flat import FlatBuffer
from disttrain.observe import log
from disttrain.progress import Phase

# The step whose timeline decides about buckets: in the first one memory is touched for the first time.
_TIMED = 2


class GradientSum:
    """Sums gradients over the ranks, bucket by bucket, during backward; every rank makes one.

    Args:
        comm: the ranks.
        buffers: where the parameters lie.
        bucket_bytes: least size of a bucket, but the last. None: by the timeline of a step and the costs of messages,
            where sums travel; it needs a compression that keeps nothing for the next sum.
        compression: of the sums of floats on their way; None: none.
        steps: how many steps' gradients make up one sum: their mean.
        scatters: whether each rank needs only its slice of the sums, that of its number in each bucket.

    Attributes:
        flat: the gradients, an array for each of `buffers`, laid out as that.
        is_summing: whether the next backward ends with sums, or leaves each rank its own gradients.
        keeps_sums: whether what it keeps are sums over the ranks, or each rank's own gradients.
    """

    keeps_sums = False

    def __init__(
        self,
        comm: Communicator,
        buffers: Sequence[FlatBuffer],
        *,
        bucket_bytes: int | None = None,
        compression: Compression | None = None,
        steps: int = 1,
        scatters: bool = False,
    ) -> None:
        self.comm = comm
        self.flat = [_zeros_like(buffer.data, comm) for buffer in buffers]
        self.is_summing = True
        self._buffers = buffers
        self._steps = steps
        self._scatters = scatters
        self._kept: list[Array] = []
        self._is_keeping = False
        self._owes = False  # whether compression may have left something behind: the same on all ranks
        self._compression = compression
        self._cut([by_size(sizes(buffer), bucket_bytes or BUCKET_BYTES) for buffer in buffers])
        keeps = any(carrier.memory is not None or carrier.guesses for carrier in self._carriers())
        self._adapts = bucket_bytes is None and not (keeps or scatters or comm.shares_memory)
        self._scale: np.float32 | None = None
        self._factor: Array = None  # the same as an array, which a plan reads in each step
        self._number = 0  # of the backward under way, of those that end with sums
        self._final_s: dict[Tensor, float] = {}
        self._view_of = views(buffers, self.flat)
        self._warned = False

    @property
    def meanwhile(self) -> Callable[[], None] | None:
        """What is to be called again and again while backward computes; None where sums do not wait for that."""
        return None if self.comm.shares_memory else self._advance

    @property
    def has_parts(self) -> bool:
        """Whether the next sum depends on what ranks have kept, each its own."""
        differs = self._owes or any(carrier.guesses for carrier in self._carriers())
        return differs or (self._is_keeping and not self.keeps_sums)

    def scale_by(self, scale: float | None) -> None:
        """Multiply losses by `scale` from the next on, and divide gradients by it once they have travelled.

        Args:
            scale: a power of two that float32 can hold, the same on all ranks; None: losses stay as they are.
        """
        self._scale = None if scale is None else np.float32(scale)
        if self._factor is None and scale is not None:
            self._factor = get_array_module(*self.flat).ones((), np.float32)
        if scale is not None:
            self._factor[...] = scale

    def backward(self, loss: Tensor) -> None:
        """Leave in every parameter's `grad` the gradient of the sum of all ranks' losses.

        A parameter that `loss` does not depend on has a gradient of 0; it is named in a warning, once.
        """
        self.begin()
        if self._scale is not None:
            loss = loss * self._factor
        progress.at(Phase.BACKWARD)
        reached = {loss, *leaves(loss)} if loss.requires_grad else set()  # a parameter may be the loss itself
        unused = [p for p in self._view_of if p not in reached]
        for parameter in unused:
            self.deliver(parameter, get_array_module(parameter.data).zeros_like(parameter.data))
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
        if self._adapts and self.is_summing:
            if self._number == _TIMED:
                self._cut_by_timeline()
                self._adapts = False
            self._number += 1
        for bucket in self.buckets:
            bucket.waiting = set(bucket.parameters)
            bucket.pending = None
        self._started = 0

    def deliver(self, parameter: Tensor, gradient: Array) -> None:
        """Put the final gradient of a parameter in its place, and sum up the buckets that are complete."""
        trace = tracing.get()
        if parameter not in self._bucket_of:  # a leaf of the user's own
            parameter.grad = gradient / (self._scale or 1)  # a copy: it may be shared
            if trace is not None:
                trace.refuse("the loss depends on a Tensor that is no weight of the model")
            return
        if trace is not None:
            trace.deliver(parameter, gradient)
        self.home(parameter)[...] = gradient
        self.final(parameter)

    def home(self, parameter: Tensor) -> Array:
        """Return where the gradient of a parameter lies."""
        return self._view_of[parameter]

    def parts(self, parameter: Tensor) -> list[Array]:
        """Return the arrays in which a backward that ended without sums has left a parameter's gradient."""
        return [self._view_of[parameter]]

    def final(self, parameter: Tensor) -> None:
        """Sum up the buckets that are complete, now that the gradient of `parameter` is in its place."""
        bucket = self._bucket_of[parameter]
        parameter.grad = self._view_of[parameter]
        bucket.waiting.discard(parameter)
        if self._adapts:
            self._final_s[parameter] = time.perf_counter()
        # bucket order, not completion order: a different order per rank would mix up the all-reduces
        if not self.is_summing:
            return
        while self._started < len(self.buckets) and not self.buckets[self._started].waiting:
            if not self.keeps_sums:
                self._complete(self.buckets[self._started], self._scale)
            self.buckets[self._started].pending = self.start(self._started)
            self._started += 1
            progress.at(Phase.BACKWARD, self._started)
        self._advance()

    def start(self, number: int, *, exactly: bool = False) -> Pending:
        """Start to sum up a bucket, by its number, over the ranks; `exactly`: without compression."""
        bucket = self.buckets[number]
        if self._scatters:
            return self.comm.start_reduce_scatter(bucket.gradient)
        if bucket.carrier is None or exactly:
            if number == len(self.buckets) - 1 and self.comm.shares_memory:  # nothing is left to compute meanwhile
                progress.at(Phase.BUCKET, number)
                self.comm.all_reduce(bucket.gradient, name=bucket.name)
                return DONE
            return self.comm.start_all_reduce(bucket.gradient, name=bucket.name)
        self._owes = self._owes or bucket.carrier.memory is not None
        return self.comm.start_all_reduce(bucket.gradient, wire=bucket.carrier.wire, name=bucket.name)

    def finish(self) -> None:
        """Wait until all buckets are summed up over the ranks, if they are to be."""
        if self.is_summing:
            self._wait()
        if self._scale is not None:
            for array in (*self.flat, *(self._memories() if self.is_summing else ())):
                array /= self._scale

    def keep(self) -> None:
        """Keep the gradients for the next update, of which they are a part."""
        kept = self._memory()
        for array, flat in zip(kept, self.flat, strict=True):
            flat /= self._steps
            array += flat

    def collect(self) -> None:
        """Add to the gradients those that were kept."""
        for bucket in self.buckets:
            self._complete(bucket)

    def forget(self) -> None:
        """Drop what was kept: it is in the last update."""
        self._is_keeping = False

    def sum_up(self, *, exactly: bool = False) -> None:
        """Replace what stands in `flat` by its sum over the ranks.

        Args:
            exactly: without compression; what earlier sums have left behind is added.
        """
        if exactly:
            self._collect_errors(self.flat)
        for number, bucket in enumerate(self.buckets):
            bucket.pending = self.start(number, exactly=exactly)
        self._wait()

    def state(self) -> tuple[dict[str, Array], dict[str, Array]]:
        """Return what the next sum depends on, by the names of parameters, after making it the same on all ranks.

        Every rank calls this, as it would a collective. What all ranks together have kept, and not sent, is then
        divided equally among them: whoever goes on from this state does so as these ranks do.

        Returns:
            The sums of what is kept, empty where that is nothing, and the compression's guesses.
        """
        guesses = {name: guess for carrier in self._carriers() for name, guess in carrier.guesses.items()}
        for guess in guesses.values():
            self.comm.broadcast(guess)
        if not self._is_keeping and not self._owes:
            return {}, guesses
        totals = self._memory()
        self._collect_errors(totals)
        kept: dict[str, Array] = {}
        for buffer, total in zip(self._buffers, totals, strict=True):
            if not self.keeps_sums:
                self.comm.all_reduce(total)
            kept.update(buffer.split(total.copy()))
            self._divide(total)
        return kept, guesses

    def restore(self, kept: dict[str, Array], guesses: dict[str, Array]) -> None:
        """Go on from what `state` returned, on any number of ranks; what is missing is as at first."""
        self._drop_errors()
        self._is_keeping = False
        if kept:
            for buffer, total in zip(self._buffers, self._memory(), strict=True):
                for name, array in buffer.split(total).items():
                    array[...] = kept[name]
                self._divide(total)
        for carrier in self._carriers():
            for name, guess in carrier.guesses.items():
                if name in guesses and guesses[name].shape == guess.shape:
                    guess[...] = guesses[name]

    def clear(self) -> None:
        """Forget a step's gradients, and what compression has not sent of them: they may not be finite."""
        for flat in self.flat:
            flat[...] = 0  # also between the parameters: a block of int8 with a NaN has become NaN
        self._drop_errors()

    def _drop_errors(self) -> None:
        for memory in self._memories():
            memory[...] = 0
        self._owes = False

    def _cut(self, lengths: Sequence[Sequence[int]]) -> None:
        """Cut each flat gradient into buckets of so many parameters."""
        parts = enumerate(zip(self._buffers, self.flat, lengths, strict=True))
        self.buckets = [b for number, part in parts for b in cut(number, *part)]
        if self._compression is not None:
            for bucket in self.buckets:
                bucket.carrier = _carrier(bucket, self._buffers[bucket.buffer], self._compression)
        self._bucket_of = {p: bucket for bucket in self.buckets for p in bucket.parameters}

    def _cut_by_timeline(self) -> None:
        """Cut into those buckets with which the sums of the step before would have ended first, on rank 0."""
        begin_s = min(self._final_s.values())
        own = [[self._final_s[p] - begin_s for p, _ in buffer.places[::-1]] for buffer in self._buffers]
        parts = zip(self._buffers, self.comm.broadcast_json(own), strict=True)
        lengths = [by_timeline(sizes(buffer), final_s, self.comm.all_reduce_s) for buffer, final_s in parts]
        self._cut(lengths)
        log.debug("buckets of %s parameters, by the timeline of a step", lengths)

    def _divide(self, total: Array) -> None:
        """Leave of what all ranks have kept this one's share."""
        if not self.keeps_sums:
            total /= self.comm.world_size

    def _memory(self) -> list[Array]:
        """Return what is kept, zeros if that is nothing."""
        if not self._kept:
            self._kept = [get_array_module(flat).zeros_like(flat) for flat in self.flat]
        elif not self._is_keeping:
            for array in self._kept:
                array[...] = 0
        self._is_keeping = True
        return self._kept

    def _carriers(self) -> list[Carrier]:
        return [bucket.carrier for bucket in self.buckets if bucket.carrier is not None]

    def _memories(self) -> list[HostArray]:
        return [carrier.memory for carrier in self._carriers() if carrier.memory is not None]

    def _collect_errors(self, flat: Sequence[Array]) -> None:
        """Add what compression has not sent to `flat`, arrays laid out as the gradients, and forget it."""
        for bucket in self.buckets if self._owes else ():
            if bucket.carrier is not None and bucket.carrier.memory is not None:
                part = flat[bucket.buffer][bucket.place]
                part += get_array_module(part).asarray(bucket.carrier.memory)
        self._drop_errors()

    def _complete(self, bucket: Bucket, scale: np.float32 | None = None) -> None:
        """Make of a step's gradients those of all steps since the last sum; `scale`: what they are multiplied by."""
        if self._steps > 1:
            bucket.gradient /= self._steps
        if self._is_keeping:
            kept = self._kept[bucket.buffer][bucket.place]
            bucket.gradient += kept if scale is None else kept * scale
        if scale is not None and bucket.carrier is not None and bucket.carrier.memory is not None:
            memory = bucket.carrier.memory
            memory *= scale

    def _wait(self) -> None:
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


def _carrier(bucket: Bucket, buffer: FlatBuffer, compression: Compression) -> Carrier | None:
    """Return what carries the sums of a bucket; None for what is no float."""
    if bucket.gradient.dtype.kind != "f":
        return None
    parts = [
        Part(
            name=parameter.name,
            place=slice(place.start - bucket.place.start, place.stop - bucket.place.start),
            shape=tuple(parameter.shape),
        )
        for parameter, place in buffer.places
        if bucket.place.start <= place.start < bucket.place.stop
    ]
    return compression.carrier(parts, bucket.gradient.size, bucket.gradient.dtype)


def _zeros_like(data: Array, comm: Communicator) -> Array:
    """Return zeros for gradients of `data`: in host memory, where `comm` sums them fastest."""
    xp = get_array_module(data)
    return comm.allocate(data.size, data.dtype) if xp is np else xp.zeros(data.size, data.dtype)
