"""A trace of a computation on one part of a batch becomes one on several parts, with the same bits.

Calls that treat the parts alike are made once, on arrays in which the parts lie one behind the other: see
`disttrain.autodiff.joining`. All others, as those that sum over samples, are made for each part, on views of its own.
So each gradient is delivered once for each part, as if the parts had been computed one after the other.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from disttrain.autodiff.joining import elementwise
from disttrain.autodiff.ops.shape import _concatenate, getitem
from disttrain.autodiff.plan import Plan
from disttrain.autodiff.trace import Constant, Seen, Trace, TracedCall


def together(plan: Plan, parts: int, **delivery: Any) -> Plan | None:
    """Return the plan that computes so many parts at once, each as `plan` does; None where that saves nothing.

    Its inputs are those of the parts, joined along the first axis; its results those of each part, one part after the
    other.

    Args:
        plan: of one part.
        parts: how many.
        **delivery: as of `Plan`; what delivers is given a parameter, and the number of a part.
    """
    apart: set[int] = set()  # calls that are made for each part, because no kernel computes them for all at once
    while True:
        joined = _Joined(plan.trace, parts, apart)
        if not joined.succeeds():
            return None
        made = Plan(joined.made, **delivery)
        found = joined.computed_otherwise(made, plan)
        if not found:
            return made
        if found <= apart:
            return None
        apart |= found


class _Joined:
    """Makes the trace of several parts from that of one.

    Attributes:
        made: the trace.
    """

    def __init__(self, trace: Trace, parts: int, apart: set[int]) -> None:
        self._trace = trace
        self._parts = parts
        self._apart = apart
        self.made = copy.copy(trace)
        self.made.seen, self.made.calls, self.made.outputs = [], [], []
        self._whole: dict[int, int] = {}  # what all parts share, or lies joined, by number in the trace of a part
        self._axis: dict[int, int] = {}  # along which it is joined
        self._own: dict[tuple[int, int], int] = {}  # what a part has for itself
        self._later: dict[int, int] = {}  # which call makes what each part has for itself: made when it is needed
        self._origins: dict[int, int] = {}  # which call of a part a call is, by its identity
        for number, seen in enumerate(trace.seen):
            if seen.array is not None and number < trace.inputs:
                shape = (parts * seen.shape[0], *seen.shape[1:])
                seen = Seen(shape, seen.dtype, np.empty(shape, seen.dtype))
                self._axis[number] = 0
            if seen.array is not None:
                self._whole[number] = self._see(seen)

    def succeeds(self) -> bool:
        """Make the trace; return whether that was possible, and a kernel has more to compute at once."""
        saves = False
        for at, call in enumerate(self._trace.calls):
            op = call.op
            if op is None:
                for part in range(self._parts):
                    number = self._of(call.output, part)
                    self.made.calls.append(replace(call, args=(number,), output=number, part=part))
            elif op.is_in_place:
                changed = call.output
                if changed not in self._whole or changed in self._axis or self._is_read_later(changed):
                    return False
                self._emit(at, [self._argument(arg, 0) for arg in call.args], output=self._whole[changed])
            elif op.is_collective:
                if op.of_parts is None or len(call.args) != 1:
                    return False
                given = [self._argument(call.args[0], part) for part in range(self._parts)]
                self._whole[call.output] = self._emit(at, given, op=op.of_parts)
            elif op.joined is None:
                return False
            elif not op.is_placed and all(isinstance(arg, Constant) or self._is_shared(arg) for arg in call.args):
                self._whole[call.output] = self._emit(at, [self._argument(arg, 0) for arg in call.args])
            elif self._join(at):
                saves = saves or op.launcher is not None
            elif op.is_placed:
                return False
            else:
                self._later[call.output] = at
        self.made.outputs = [self._of(n, part) for part in range(self._parts) for n in self._trace.outputs]
        return saves

    def computed_otherwise(self, made: Plan, plan: Plan) -> set[int]:
        """Return the calls that a kernel computes in one of two plans and not in the other, or not for all at once."""
        found = set()
        for call, computes in zip(made.trace.calls, made.by_kernel, strict=True):
            at = self._origins.get(id(call))
            if at is None or call.op is None or call.op.launcher is None or call.op.joined is elementwise:
                continue  # what is exact has the same bits however it is computed
            is_joined = self._trace.calls[at].output in self._axis
            if computes != plan.by_kernel[at] or (is_joined and not computes):
                found.add(at)
        return found

    def _join(self, at: int) -> bool:
        """Make a call once for all parts, if its op can; return whether."""
        call = self._trace.calls[at]
        assert call.op is not None
        assert call.op.joined is not None
        numbers = [arg for arg in call.args if isinstance(arg, int)]
        if at in self._apart or any(number not in self._whole for number in numbers):
            return False
        axes = tuple(self._axis.get(arg) if isinstance(arg, int) else None for arg in call.args)
        seen = [self._trace.seen[arg] if isinstance(arg, int) else arg.value for arg in call.args]
        found = call.op.joined(axes, self._trace.seen[call.output], *seen, **call.attributes)
        if found is None:
            return False
        axis, wanted = found
        args: list[int | Constant] = []
        for arg, own, its in zip(call.args, axes, wanted, strict=True):
            if own == its:
                args.append(self._whole[arg] if isinstance(arg, int) else arg)
            elif own is None and isinstance(arg, int):  # all parts have the same, and need one each
                args.append(
                    self._add(_concatenate, [self._whole[arg]] * self._parts, self._joined_seen(arg, its), axis=its)
                )
            else:
                return False
        self._axis[call.output] = axis
        self._whole[call.output] = self._emit(at, args, axis=axis)
        return True

    def _argument(self, arg: int | Constant, part: int) -> int | Constant:
        return self._of(arg, part) if isinstance(arg, int) else arg

    def _of(self, number: int, part: int) -> int:
        """Return what a part has in place of an array; what makes it is called now, if it was not."""
        waiting = [number]
        while waiting:  # no recursion: a chain may be as long as the model is deep
            wanted = waiting[-1]
            needed = [] if self._has(wanted, part) else self._trace.calls[self._later[wanted]].args
            missing = [arg for arg in needed if isinstance(arg, int) and not self._has(arg, part)]
            if missing:
                waiting += missing
                continue
            waiting.pop()
            if not self._has(wanted, part):
                args = [self._held(arg, part) if isinstance(arg, int) else arg for arg in needed]
                self._own[wanted, part] = self._emit(self._later[wanted], args)
        return self._held(number, part)

    def _has(self, number: int, part: int) -> bool:
        return number in self._whole or (number, part) in self._own

    def _held(self, number: int, part: int) -> int:
        """Return what a part has in place of an array that there is: of what is joined, a view."""
        if self._is_shared(number):
            return self._whole[number]
        if (number, part) not in self._own:
            seen, axis = self._trace.seen[number], self._axis[number]
            length = seen.shape[axis]
            index = (*[slice(None)] * axis, slice(part * length, (part + 1) * length))
            view = self._add(getitem, [self._whole[number]], Seen(seen.shape, seen.dtype), index=index)
            self._own[number, part] = view
        return self._own[number, part]

    def _is_shared(self, number: int) -> bool:
        return number in self._whole and number not in self._axis

    def _is_read_later(self, number: int) -> bool:
        return any(number in self._trace.calls[at].args for at in self._later.values())

    def _emit(
        self, at: int, args: Sequence[int | Constant], *, axis: int | None = None, op: Any = None,
        output: int | None = None,
    ) -> int:  # fmt: skip
        """Add a call that a part makes, of all parts along `axis`; return what it makes."""
        call = self._trace.calls[at]
        attributes = call.attributes
        if output is None:
            made = self._joined_seen(call.output, axis)
            output = self._see(made)
            if axis is not None and "shape" in attributes:  # which is the output's
                attributes = {**attributes, "shape": made.shape}
        added = replace(call, op=op or call.op, args=tuple(args), attributes=attributes, output=output)
        self._origins[id(added)] = at
        self.made.calls.append(added)
        return output

    def _add(self, op: Any, args: Sequence[int], made: Seen, **attributes: Any) -> int:
        """Add a call that no part makes; return what it makes."""
        output = self._see(made)
        self.made.calls.append(TracedCall(op=op, args=tuple(args), attributes=attributes, output=output))
        return output

    def _joined_seen(self, number: int, axis: int | None) -> Seen:
        """Return what an array is with those of the other parts along `axis`."""
        seen = self._trace.seen[number]
        return Seen(tuple(n * self._parts if i == axis else n for i, n in enumerate(seen.shape)), seen.dtype)

    def _see(self, seen: Seen) -> int:
        self.made.seen.append(seen)
        return len(self.made.seen) - 1
