"""A trace: the calls of one step, forward and backward, as a plan needs to know them."""

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from disttrain.autodiff.op import Op, Recorded, tracing
from disttrain.backend import Array


@dataclass(frozen=True, kw_only=True)
class Constant:
    """An argument that is the same in every step."""

    value: Any


@dataclass(frozen=True, kw_only=True)
class TracedCall:
    """A call: its arguments and its output are numbers of arrays; or, for `op` None, a delivery.

    Attributes:
        part: of the batch whose gradient is delivered, where several are computed together.
    """

    op: Op[Any] | None
    args: tuple[int | Constant, ...]
    attributes: dict[str, Any]
    output: int
    parameter: Any = None
    part: int | None = None


@dataclass
class Seen:
    """An array of a trace. `array` is kept only for what the step did not compute."""

    shape: tuple[int, ...]
    dtype: Any
    array: Any = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return self.size * int(self.dtype.itemsize)


class Trace:
    """The calls of one step.

    Args:
        inputs: arrays that differ from step to step.
        weights: Tensors that keep their memory.
    """

    def __init__(self, inputs: Sequence[Array], weights: Sequence[Recorded]) -> None:
        self.seen: list[Seen] = []
        self.calls: list[TracedCall] = []
        self.inputs = len(inputs)
        self.outputs: list[int] = []
        self.refusal = ""
        self._number_of: dict[int, tuple[Callable[[], Any], int]] = {}  # by address, with what lives there
        for array in (*inputs, *(weight.data for weight in weights)):
            self._see(array, keep=True)
        self.given = len(self.seen)

    @contextlib.contextmanager
    def running(self) -> Iterator[list[Array]]:
        """Trace what runs inside a ``with`` block, which puts the step's results into the list that this gives."""
        results: list[Array] = []
        token = tracing.set(self)
        try:
            yield results
        finally:
            tracing.reset(token)
        self.outputs = [self._number(array) for array in results]
        self._number_of = {}

    def add(self, op: Op[Any], args: Sequence[Any], attributes: dict[str, Any], output: Array) -> None:
        """Note a call of `op`; of Python's numbers only, it is as constant as they are."""
        if not hasattr(output, "dtype"):
            return
        numbers = tuple(self._argument(arg) for arg in args)
        if op.is_in_place:
            self.calls.append(TracedCall(op=op, args=numbers, attributes=attributes, output=self._number(output)))
        elif self._known(output) is None:  # else it gave one of its arguments back
            self.calls.append(TracedCall(op=op, args=numbers, attributes=attributes, output=self._see(output)))

    def deliver(self, parameter: Any, gradient: Array) -> None:
        """Note that the gradient of `parameter` is final."""
        number = self._number(gradient)
        self.calls.append(TracedCall(op=None, args=(number,), attributes={}, output=number, parameter=parameter))

    def refuse(self, reason: str) -> None:
        """Note why this step cannot be replayed."""
        self.refusal = self.refusal or reason

    def difference(self, other: "Trace") -> str:
        """Return why `other`, the trace of another step, is not the same; empty if it is."""
        if self.refusal or other.refusal:
            return self.refusal or other.refusal
        if len(self.calls) != len(other.calls) or self.outputs != other.outputs:
            return f"one step made {len(self.calls)} calls, another {len(other.calls)}"
        if len(self.seen) != len(other.seen):
            return "one step used other constants than another"
        for call, its in zip(self.calls, other.calls, strict=True):
            name = call.op.name if call.op else "a gradient"
            if call.op is not its.op or call.parameter is not its.parameter or call.output != its.output:
                return f"{name} was called in one step and not in another"
            if not _equal(call.args, its.args) or not _equal(call.attributes, its.attributes):
                return f"{name} was called with other constants: computed outside of ops, they differ between steps"
        for number, (mine, theirs) in enumerate(zip(self.seen, other.seen, strict=True)):
            if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
                return "an array had another shape or dtype"
            if number < self.inputs:
                continue
            if number < self.given and mine.array is not theirs.array:
                return "a weight moved to other memory"
            if number >= self.given and not _equal(mine.array, theirs.array):
                return "an array that was computed outside of ops differs between steps"
        return ""

    def _argument(self, arg: Any) -> int | Constant:
        return self._number(arg) if hasattr(arg, "dtype") else Constant(value=arg)

    def _number(self, array: Array) -> int:
        known = self._known(array)
        return self._see(array, keep=True) if known is None else known

    def _known(self, array: Array) -> int | None:
        lives, number = self._number_of.get(id(array), (lambda: None, 0))
        return number if lives() is array else None

    def _see(self, array: Array, *, keep: bool = False) -> int:
        # weakly, so that a traced step needs no more memory than another; NumPy's scalars cannot be
        lives = weakref.ref(array) if isinstance(array, np.ndarray) else lambda: array
        self._number_of[id(array)] = (lives, len(self.seen))
        self.seen.append(Seen(array.shape, array.dtype, array if keep else None))
        return len(self.seen) - 1


def _equal(a: Any, b: Any) -> bool:
    """Return whether two constants are the same, arrays by their values."""
    if isinstance(a, Constant) and isinstance(b, Constant):
        return _equal(a.value, b.value)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if hasattr(a, "dtype") and hasattr(b, "dtype") and hasattr(a, "shape") and hasattr(b, "shape"):
        return a is b or (a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
    return type(a) is type(b) and bool(a == b)
