"""A plan: the calls of a step, seen twice to be the same, replayed as a flat list over memory that stays.

A `Trace` is told of every call of an op, forward and backward. If two steps made the same calls, on the same
shapes and with the same constants, the second becomes a `Plan`: for each call a function and its prepared
arguments, in one arena in which arrays that do not live at the same time share their place. Nothing else of the
step runs again: what Python computed outside of ops, or decided by looking at values, is what it was.
"""

import copy
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from disttrain.autodiff.ops.shape import reshape
from disttrain.autodiff.trace import Seen, Trace, TracedCall
from disttrain.backend import Array

_ALIGNMENT = 64


class Row(NamedTuple):
    """A call of a plan, as people want to see it.

    Attributes:
        name: of the op.
        arguments: their shapes, and constants.
        output: its shape.
        nbytes: that it writes.
        flops: floating-point operations, as `Op.flops` counts them.
        where: what the output is written to; ``"view"`` where nothing is.
    """

    name: str
    arguments: str
    output: str
    nbytes: int
    flops: int
    where: str


@dataclass(kw_only=True)
class Block:
    """Bytes of the arena that are in use from the call `first` to the call `last`."""

    size: int
    first: int
    last: int
    offset: int = 0


class Plan:
    """A step as a flat list of functions and prepared arguments.

    Args:
        trace: of the step.
        home: gives the array that the gradient of a parameter belongs in.
        final: called with a parameter when its gradient is there. Both are given the number of the part as well,
            where several parts of a batch are computed together.
        meanwhile: called again and again from then on, between the calls of the step. With it, what is not needed for a
            gradient waits until it is needed, so that gradients are there early.

    Attributes:
        trace: what it replays, in its order.
        by_kernel: of each call, whether a kernel computes it.
        blocks: how the arena is used.
        arena_bytes: memory of all that the step computes.
        computed_bytes: what that would take if no two arrays shared a place.
    """

    def __init__(
        self,
        trace: Trace,
        *,
        home: Callable[..., Array],
        final: Callable[..., None],
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        if meanwhile is not None:
            trace = copy.copy(trace)
            trace.calls = _late(trace.calls)
        self.trace = trace
        self._base = _bases(trace)
        self._homes = self._find_homes(home)
        blocks = self._blocks()
        self.blocks = list({id(block): block for block in blocks.values()}.values())
        self.arena_bytes = _place(self.blocks)
        self.computed_bytes = sum(trace.seen[root].nbytes for root in blocks)
        self._arrays = self._materialize(blocks)
        self.by_kernel = [False] * len(trace.calls)
        prepared = [list(self._prepare(number, home, final)) for number in range(len(trace.calls))]
        if meanwhile is not None:
            first = next((i for i, call in enumerate(trace.calls) if call.op is None), len(prepared))
            for steps in prepared[first + 1 :]:
                steps.append((meanwhile, ()))
        self._steps = [step for steps in prepared for step in steps]
        self._counts = [len(steps) for steps in prepared]

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Take the step on other `inputs`; return its results, which the next step writes over."""
        for number, array in enumerate(inputs):
            np.copyto(self._arrays[number], array)
        for function, args in self._steps:
            function(*args)
        return [self._arrays[number] for number in self.trace.outputs]

    def times_s(self, runs: int) -> list[float]:
        """Return the shortest time that each call took, in the order of `rows`, over `runs` runs on the last inputs.

        For a look at a plan that is done with: what calls change in place they change again. No gradient is delivered.
        """
        shortest = [float("inf")] * len(self._counts)
        for _ in range(runs):
            steps = iter(self._steps)
            for number, (call, count) in enumerate(zip(self.trace.calls, self._counts, strict=True)):
                begin = time.perf_counter()
                for function, args in itertools.islice(steps, count):
                    if call.op is not None or function is np.copyto:
                        function(*args)
                shortest[number] = min(shortest[number], time.perf_counter() - begin)
        return shortest

    def rows(self) -> Iterator[Row]:
        """Yield the calls."""
        for call in self.trace.calls:
            given = [self.trace.seen[a] if isinstance(a, int) else a.value for a in call.args]
            arguments = ", ".join(str(a.shape) if isinstance(a, Seen) else repr(a) for a in given)
            made = self.trace.seen[call.output]
            if call.op is None:
                yield Row("gradient of " + call.parameter.name, arguments, "", 0, 0, "final")
            elif call.output in self._base:
                yield Row(call.op.name, arguments, str(made.shape), 0, 0, "view")
            else:
                where = "gradient" if call.output in self._homes else "arena" if call.op.writer else "arena, copied"
                flops = call.op.flops(made, *given, **call.attributes)
                yield Row(call.op.name, arguments, str(made.shape), made.nbytes, flops, where)

    def _root(self, number: int) -> int:
        while number in self._base:
            number = self._base[number]
        return number

    def _find_homes(self, home: Callable[..., Array]) -> dict[int, Array]:
        """Return the arrays that are computed right where a gradient belongs: nobody needs them afterwards.

        Nor does anybody else write there before the gradient is final: that could be while a collective waits, or when
        another part's gradient is delivered.
        """
        last_use = {self._root(a): i for i, c in enumerate(self.trace.calls) for a in c.args if isinstance(a, int)}
        made = {c.output: i for i, c in enumerate(self.trace.calls) if c.op is not None}
        waits = list(itertools.accumulate(c.op is not None and c.op.is_collective for c in self.trace.calls))
        deliveries = Counter(self._root(c.output) for c in self.trace.calls if c.op is None)
        homes: dict[int, Array] = {}
        last: dict[int, int] = {}  # delivery of each parameter
        for i, call in enumerate(self.trace.calls):
            root = self._root(call.output)
            before = last.get(id(call.parameter), -1)
            if call.op is None:
                last[id(call.parameter)] = i
            if (
                call.op is None
                and deliveries[root] == 1
                and last_use[root] == i
                and self.trace.seen[root].array is None
                and self._is_reshaped(call.output)
                and waits[made[root]] == waits[i]
                and before < made[root]
            ):
                homes[root] = home(*_delivered(call)).reshape(self.trace.seen[root].shape)
        return homes

    def _is_reshaped(self, number: int) -> bool:
        """Return whether an array holds what the array does that it is a view of, in the same order."""
        reshaped = {call.output for call in self.trace.calls if call.op is reshape}
        while number in self._base and number in reshaped:
            number = self._base[number]
        return number not in self._base

    def _blocks(self) -> dict[int, Block]:
        """Return the memory of each array that is computed into the arena."""
        blocks: dict[int, Block] = {}
        last_use = {self._root(a): i for i, c in enumerate(self.trace.calls) for a in c.args if isinstance(a, int)}
        last_use.update({self._root(number): len(self.trace.calls) for number in self.trace.outputs})
        for i, call in enumerate(self.trace.calls):
            number = call.output
            if call.op is None or call.op.is_in_place or number in self._base or number in self._homes:
                continue
            seen = self.trace.seen[number]
            block = self._written_over(call, i, blocks, last_use)
            if block is None:
                block = Block(size=-(-seen.nbytes // _ALIGNMENT) * _ALIGNMENT, first=i, last=i)
            block.last = last_use.get(number, i)
            blocks[number] = block
        return blocks

    def _written_over(self, call: TracedCall, at: int, blocks: dict[int, Block], last: dict[int, int]) -> Any:
        """Return the block of an argument that nobody needs after this elementwise call, or None."""
        assert call.op is not None
        seen = self.trace.seen[call.output]
        for arg in call.args if call.op.is_elementwise else ():
            if isinstance(arg, int) and arg in blocks and last[arg] == at:
                given = self.trace.seen[arg]
                if given.shape == seen.shape and given.dtype == seen.dtype:
                    return blocks[arg]
        return None

    def _materialize(self, blocks: dict[int, Block]) -> dict[int, Any]:
        """Return all arrays: given ones, those in the arena and in gradients, and views of them."""
        arrays: dict[int, Any] = {n: seen.array for n, seen in enumerate(self.trace.seen) if seen.array is not None}
        arrays.update({n: np.empty_like(arrays[n]) for n in range(self.trace.inputs)})
        arrays.update(self._homes)
        arena = _aligned(self.arena_bytes)
        for number, block in blocks.items():
            seen = self.trace.seen[number]
            raw = arena[block.offset : block.offset + seen.nbytes]
            arrays[number] = raw.view(seen.dtype).reshape(seen.shape)
        for call in self.trace.calls:
            if call.op is not None and call.output in self._base:
                arrays[call.output] = call.op.function(arrays[self._base[call.output]], **call.attributes)
        return arrays

    def _prepare(
        self, number: int, home: Callable[..., Array], final: Callable[..., None]
    ) -> Iterator[tuple[Callable[..., Any], tuple[Any, ...]]]:
        """Yield what is to be called for a call: nothing for a view."""
        call = self.trace.calls[number]
        args = tuple(self._arrays[a] if isinstance(a, int) else a.value for a in call.args)
        if call.op is None:
            if call.output not in self._homes:
                yield np.copyto, (home(*_delivered(call)), args[0])
            yield final, _delivered(call)
        elif call.op.is_in_place:
            yield partial(call.op.function, **call.attributes), args
        elif call.output not in self._base:
            out = self._arrays[call.output]
            launch = call.op.launcher(*args, out=out, **call.attributes) if call.op.launcher else None
            self.by_kernel[number] = launch is not None
            if launch is not None:
                yield launch.function, launch.args
            elif call.op.writer is None:
                yield partial(_compute, out, call.op.function, call.attributes), args
            else:
                yield partial(call.op.writer, out=out, **call.attributes), args


def _late(calls: Sequence[TracedCall]) -> list[TracedCall]:
    """Return `calls`, each just before the first that needs it, but none beyond one that has to keep its place.

    Such are deliveries among themselves, calls that change an array in place, and those that wait for others.
    """
    ordered: list[TracedCall] = []  # from the last to the first
    for call in reversed(calls):
        at = len(ordered)
        if call.op is not None and not _keeps_its_place(call):
            while at > 0 and not _keeps_its_place(ordered[at - 1]) and not _needs(ordered[at - 1], call):
                at -= 1
            if at == 0 or not _needs(ordered[at - 1], call):
                at = len(ordered)  # nobody needs it, or not on this side
        ordered.insert(at, call)
    return ordered[::-1]


def _keeps_its_place(call: TracedCall) -> bool:
    return call.op is not None and (call.op.is_in_place or call.op.is_collective)


def _needs(call: TracedCall, other: TracedCall) -> bool:
    """Return whether `call` is given what `other` makes."""
    return call.output == other.output if call.op is None else other.output in call.args


def _delivered(call: TracedCall) -> tuple[Any, ...]:
    """Return what says which gradient a delivery is."""
    return (call.parameter,) if call.part is None else (call.parameter, call.part)


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


def _place(blocks: Iterable[Block]) -> int:
    """Give each block an offset, so that those in use at the same time do not overlap; return the size of all.

    The largest first, each at the lowest offset where it fits. Source: Pisarchyk & Lee, "Efficient memory
    management for deep neural net inference", 2020.
    """
    placed: list[Block] = []
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


def _aligned(size: int) -> Array:
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size]
