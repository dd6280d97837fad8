"""A plan: the calls of a step, seen twice to be the same, replayed as a flat list over memory that stays.

A `Trace` is told of every call of an op, forward and backward. If two steps made the same calls, on the same
shapes and with the same constants, the second becomes a `Plan`: for each call a function and its prepared
arguments, in one arena in which arrays that do not live at the same time share their place. Nothing else of the
step runs again: what Python computed outside of ops, or decided by looking at values, is what it was.
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from disttrain.autodiff.op import Op, Recorded, tracing
from disttrain.backend import Array

_ALIGNMENT = 64


@dataclass(frozen=True, kw_only=True)
class Constant:
    """An argument that is the same in every step."""

    value: Any


@dataclass(frozen=True, kw_only=True)
class TracedCall:
    """A call: its arguments and its output are numbers of arrays; or, for `op` None, a delivery."""

    op: Op[Any] | None
    args: tuple[int | Constant, ...]
    attributes: dict[str, Any]
    output: int
    parameter: Any = None


@dataclass
class _Seen:
    """An array of a trace. `array` is kept only for what the step did not compute."""

    shape: tuple[int, ...]
    dtype: Any
    array: Any = None


class Trace:
    """The calls of one step.

    Args:
        inputs: arrays that differ from step to step.
        weights: Tensors that keep their memory.
    """

    def __init__(self, inputs: Sequence[Array], weights: Sequence[Recorded]) -> None:
        self.seen: list[_Seen] = []
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
        self.seen.append(_Seen(array.shape, array.dtype, array if keep else None))
        return len(self.seen) - 1


@dataclass(kw_only=True)
class _Block:
    """Memory that is in use from the call `first` to the call `last`."""

    size: int
    first: int
    last: int
    offset: int = 0


class Plan:
    """A step as a flat list of functions and prepared arguments.

    Args:
        trace: of the step.
        home: gives the array that the gradient of a parameter belongs in.
        final: called with a parameter when its gradient is there.

    Attributes:
        arena_bytes: memory of all that the step computes.
        computed_bytes: what that would take if no two arrays shared a place.
    """

    def __init__(self, trace: Trace, *, home: Callable[[Any], Array], final: Callable[[Any], None]) -> None:
        self._trace = trace
        self._base = _bases(trace)
        self._homes = self._find_homes(home)
        blocks = self._blocks()
        self.arena_bytes = _place({id(block): block for block in blocks.values()}.values())
        self.computed_bytes = sum(_nbytes(trace.seen[root]) for root in blocks)
        self._arrays = self._materialize(blocks)
        self._steps = [step for call in trace.calls for step in self._prepare(call, home, final)]

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Take the step on other `inputs`; return its results, which the next step writes over."""
        for number, array in enumerate(inputs):
            np.copyto(self._arrays[number], array)
        for function, args in self._steps:
            function(*args)
        return [self._arrays[number] for number in self._trace.outputs]

    def rows(self) -> Iterator[tuple[str, str, str, int, str]]:
        """Yield for each call its op, the shapes of its arguments and its output, the bytes it writes, and where."""
        for call in self._trace.calls:
            shapes = [str(self._trace.seen[a].shape) if isinstance(a, int) else repr(a.value) for a in call.args]
            seen = self._trace.seen[call.output]
            if call.op is None:
                yield "gradient of " + call.parameter.name, shapes[0], "", 0, "final"
            elif call.output in self._base:
                yield call.op.name, ", ".join(shapes), str(seen.shape), 0, "view"
            else:
                where = "gradient" if call.output in self._homes else (call.op.writer and "arena") or "arena, copied"
                yield call.op.name, ", ".join(shapes), str(seen.shape), _nbytes(seen), str(where)

    def _root(self, number: int) -> int:
        while number in self._base:
            number = self._base[number]
        return number

    def _find_homes(self, home: Callable[[Any], Array]) -> dict[int, Array]:
        """Return the arrays that are computed right where a gradient belongs: nobody needs them afterwards."""
        last_use = {self._root(a): i for i, c in enumerate(self._trace.calls) for a in c.args if isinstance(a, int)}
        deliveries = Counter(self._root(c.output) for c in self._trace.calls if c.op is None)
        return {
            c.output: home(c.parameter)
            for i, c in enumerate(self._trace.calls)
            if c.op is None
            and c.output not in self._base
            and deliveries[c.output] == 1
            and last_use[c.output] == i
            and self._trace.seen[c.output].array is None
        }

    def _blocks(self) -> dict[int, _Block]:
        """Return the memory of each array that is computed into the arena."""
        blocks: dict[int, _Block] = {}
        last_use = {self._root(a): i for i, c in enumerate(self._trace.calls) for a in c.args if isinstance(a, int)}
        last_use.update({self._root(number): len(self._trace.calls) for number in self._trace.outputs})
        for i, call in enumerate(self._trace.calls):
            number = call.output
            if call.op is None or call.op.is_in_place or number in self._base or number in self._homes:
                continue
            seen = self._trace.seen[number]
            block = self._written_over(call, i, blocks, last_use)
            if block is None:
                block = _Block(size=-(-_nbytes(seen) // _ALIGNMENT) * _ALIGNMENT, first=i, last=i)
            block.last = last_use.get(number, i)
            blocks[number] = block
        return blocks

    def _written_over(self, call: TracedCall, at: int, blocks: dict[int, _Block], last: dict[int, int]) -> Any:
        """Return the block of an argument that nobody needs after this elementwise call, or None."""
        assert call.op is not None
        seen = self._trace.seen[call.output]
        for arg in call.args if call.op.is_elementwise else ():
            if isinstance(arg, int) and arg in blocks and last[arg] == at:
                given = self._trace.seen[arg]
                if given.shape == seen.shape and given.dtype == seen.dtype:
                    return blocks[arg]
        return None

    def _materialize(self, blocks: dict[int, _Block]) -> dict[int, Any]:
        """Return all arrays: given ones, those in the arena and in gradients, and views of them."""
        arrays: dict[int, Any] = {n: seen.array for n, seen in enumerate(self._trace.seen) if seen.array is not None}
        arrays.update({n: np.empty_like(arrays[n]) for n in range(self._trace.inputs)})
        arrays.update(self._homes)
        arena = _aligned(self.arena_bytes)
        for number, block in blocks.items():
            seen = self._trace.seen[number]
            raw = arena[block.offset : block.offset + _nbytes(seen)]
            arrays[number] = raw.view(seen.dtype).reshape(seen.shape)
        for call in self._trace.calls:
            if call.op is not None and call.output in self._base:
                arrays[call.output] = call.op.function(arrays[self._base[call.output]], **call.attributes)
        return arrays

    def _prepare(
        self, call: TracedCall, home: Callable[[Any], Array], final: Callable[[Any], None]
    ) -> Iterator[tuple[Callable[..., Any], tuple[Any, ...]]]:
        """Yield what is to be called for `call`: nothing for a view."""
        args = tuple(self._arrays[a] if isinstance(a, int) else a.value for a in call.args)
        if call.op is None:
            if call.output not in self._homes:
                yield np.copyto, (home(call.parameter), args[0])
            yield final, (call.parameter,)
        elif call.op.is_in_place:
            yield partial(call.op.function, **call.attributes), args
        elif call.output not in self._base:
            out = self._arrays[call.output]
            launch = call.op.launcher(*args, out=out, **call.attributes) if call.op.launcher else None
            if launch is not None:
                yield launch.function, launch.args
            elif call.op.writer is None:
                yield partial(_compute, out, call.op.function, call.attributes), args
            else:
                yield partial(call.op.writer, out=out, **call.attributes), args


def _compute(out: Array, function: Callable[..., Array], attributes: dict[str, Any], *args: Any) -> None:
    """Compute what has no writer of its own, and copy it to its place."""
    out[...] = function(*args, **attributes)


def _bases(trace: Trace) -> dict[int, int]:
    """Return, for each array that is a view, the array that it is a view of."""
    bases: dict[int, int] = {}
    like: dict[int, Array] = {}
    for call in trace.calls:
        if call.op is None or not call.op.may_view or not isinstance(call.args[0], int):
            continue
        given = call.args[0]
        if given not in like:  # memory that is never touched; what counts are its strides
            seen = trace.seen[given]
            like[given] = np.empty(seen.shape, bool) if seen.array is None or given < trace.inputs else seen.array
        view = call.op.function(like[given], **call.attributes)
        if view.size == 0 or np.may_share_memory(view, like[given]):
            bases[call.output] = given
            like[call.output] = view
    return bases


def _place(blocks: Iterable[_Block]) -> int:
    """Give each block an offset, so that those in use at the same time do not overlap; return the size of all.

    The largest first, each at the lowest offset where it fits. Source: Pisarchyk & Lee, "Efficient memory
    management for deep neural net inference", 2020.
    """
    placed: list[_Block] = []
    for block in sorted(blocks, key=lambda b: (-b.size, b.first)):
        neighbours = [b for b in placed if b.first <= block.last and block.first <= b.last]
        offset = 0
        for other in sorted(neighbours, key=lambda b: b.offset):
            if other.offset - offset >= block.size:
                break
            offset = max(offset, other.offset + other.size)
        block.offset = offset
        placed.append(block)
    return max((block.offset + block.size for block in placed), default=0)


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


def _nbytes(seen: _Seen) -> int:
    return int(np.prod(seen.shape, dtype=np.int64)) * int(seen.dtype.itemsize)


def _aligned(size: int) -> Array:
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size]
