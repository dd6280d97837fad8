"""An op is a pure function on arrays with its gradient rule beside it; called with Tensors it also records.

Arrays are positional arguments, attributes keyword-only. A rule takes the cotangent `g`, the output `y` and
the arguments, and gives one cotangent per array argument, written with ops: applied to arrays it just
computes, applied to Tensors it is recorded in turn, which is how gradients of gradients work.

A rule says by its parameters' names what must be kept until backward: an argument that begins with an
underscore is not kept, only its `shape`, `ndim`, `size` and `dtype` arrive (None for one without gradient), and
an output is None. A rule that can save work asks for the keyword `needs`: one bool per argument.

An op may have a kernel beside its rule: other code for the same result, which says where it does not apply. The
function stays the definition, serves everywhere else, and is what the kernel is tested against.
"""

import contextlib
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any, Generic, ParamSpec

import numpy as np

from disttrain.autodiff import joining
from disttrain.backend import Array
from disttrain.errors import AutodiffError
from disttrain.kernels.library import Launch

P = ParamSpec("P")
Rule = Callable[..., tuple[Array, ...]]
Kernel = Callable[..., Launch | None]

_recording: ContextVar[bool] = ContextVar("recording", default=True)
tracing: ContextVar[Any] = ContextVar("tracing", default=None)  # who is told of every call: a Trace, or None
_numbers = itertools.count()


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Record calls inside a ``with`` block, under `no_grad` too."""
    token = _recording.set(True)
    try:
        yield
    finally:
        _recording.reset(token)


class no_grad(contextlib.ContextDecorator):  # noqa: N801  # the name that PyTorch's users know
    """Record nothing inside: ``with no_grad():`` or as a decorator."""

    def __init__(self) -> None:
        self._tokens: list[Token[bool]] = []  # of the blocks entered: one object may serve several, one in another

    def _recreate_cm(self) -> "no_grad":  # a decorated function may call itself
        return no_grad()

    def __enter__(self) -> None:
        self._tokens.append(_recording.set(False))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _recording.reset(self._tokens.pop())


def is_recording() -> bool:
    """Return whether calls are recorded here: not under `no_grad`."""
    return _recording.get()


class Recorded:
    """An array that remembers the call which made it: what an op needs to know of a Tensor.

    Attributes:
        data: the array.
        call: the call that made it; None for a leaf.
        requires_grad: whether backward computes a gradient for it.
        grad: the gradient that backward has summed up here, an array; None before.
        name: how messages call it; empty when nobody named it.
    """

    __slots__ = ("__weakref__", "call", "data", "grad", "name", "requires_grad")

    def __init__(self, data: Array, *, requires_grad: bool = False, name: str = "") -> None:
        self.data = data
        self.call: Call | None = None
        self.requires_grad = requires_grad
        self.grad: Array = None
        self.name = name

    @classmethod
    def of_call(cls, data: Array, call: "Call | None") -> "Recorded":
        """Return the output `data` of `call`, a Tensor that requires a gradient if `call` is given."""
        made = cls.__new__(cls)
        made.data = data
        made.call = call
        made.requires_grad = call is not None
        made.grad = None
        made.name = ""
        return made


def array_of(x: Array) -> Array:
    """Return the array of a Tensor, anything else as it is: for masks and indices, which have no gradient."""
    return x.data if isinstance(x, Recorded) else x


class Call:
    """One recorded application of an op.

    Calls refer to calls, not to Tensors, so that an array lives only as long as a rule or the user needs it.
    """

    __slots__ = (
        "attributes", "dtype", "inputs", "kind", "needs", "number", "op", "output", "saved", "shape",
    )  # fmt: skip

    def __init__(
        self, op: "Op[Any]", args: tuple[Any, ...], arrays: list[Any], attributes: dict[str, Any],
        output: Array, kind: type[Recorded],
    ) -> None:  # fmt: skip
        self.op = op
        self.number = next(_numbers)
        self.attributes = attributes
        self.kind = kind
        self.shape = output.shape
        self.dtype = output.dtype
        self.needs = tuple(isinstance(a, Recorded) and a.requires_grad for a in args)
        self.inputs: tuple[Any, ...] = tuple(
            (a.call or a) if need else None for a, need in zip(args, self.needs, strict=True)
        )
        self.saved: list[Any] | None = op.select(arrays)
        self.output = output if op.keeps_output else None

    @property
    def ndim(self) -> int:
        """Number of axes of the output."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements of the output."""
        return math.prod(self.shape)

    def pull_back(self, g: Array, *, record: bool) -> tuple[Array, ...]:
        """Return the cotangents of the arguments, given the cotangent `g` of the output.

        Args:
            g: an array; a Tensor if `record`, and then the cotangents are Tensors too.
            record: whether the rule itself is to be recorded.
        """
        if self.saved is None:
            raise AutodiffError(
                f"the graph behind this {self.op.name!r} was freed by an earlier backward(); "
                "call that one with retain_graph=True, or compute the loss again"
            )
        rule = self.op.rule
        if rule is None:
            raise AutodiffError(f"op {self.op.name!r} has no gradient rule; add one with @{self.op.name}.vjp")
        output = self.output
        saved = [
            node if array is None else self._tensor(array, node) if record and node is not None else array
            for array, node in zip(self.saved, self.inputs, strict=True)
        ]
        if record:
            output = None if output is None else self.kind.of_call(output, self)
        if self.op.asks_needs:
            return rule(g, output, *saved, needs=self.needs, **self.attributes)
        return rule(g, output, *saved, **self.attributes)

    def argument(self, number: int) -> Any:
        """Return an argument that was kept for the rule, as the Tensor it was if it requires a gradient."""
        if self.saved is None or self.saved[number] is None:
            raise AutodiffError(f"op {self.op.name!r} did not keep its argument {number}")
        array, node = self.saved[number], self.inputs[number]
        return array if node is None else self._tensor(array, node)

    def release(self) -> None:
        """Forget what was kept for the rule; a second backward through this call is an error."""
        self.saved = None
        self.output = None
        self.inputs = ()

    def _tensor(self, array: Array, node: Any) -> Recorded:
        return node if isinstance(node, Recorded) else self.kind.of_call(array, node)


class Op(Generic[P]):
    """A function on arrays that records its calls. Made by the decorator `op`.

    Attributes:
        flops: ``flops(made, *given, **attributes)`` counts the floating-point operations of a call, a multiplication
            and an addition being two, from what has the arrays' `shape` and `size`. By default one for each element
            of the largest array.
        joined: its rule in `disttrain.autodiff.joining`; None: nobody has said, and no call of it is made for a part of
            a batch while others are computed.
        of_parts: of one that waits for others, the op that is given the arrays of several parts in its place.
    """

    def __init__(self, function: Callable[P, Array]) -> None:
        self.definition = function
        self.function: Callable[..., Array] = function  # what is called: the definition, or a kernel before it
        self.launcher: Kernel | None = None
        self.name = function.__name__
        self.rule: Rule | None = None
        self.writer: Callable[..., Any] | None = None
        self.flops: Callable[..., int] = _one_each
        self.is_elementwise = False
        self.may_view = False  # whether its output may be its first argument's memory in another shape
        self.is_in_place = False  # whether it changes its first argument, and returns it
        self.is_collective = False  # whether it waits for others, who may compute meanwhile
        self.is_placed = False  # whether its output depends on where in the batch its samples stand
        self.joined: joining.Rule | None = None
        self.of_parts: Op[Any] | None = None
        self.keeps_output = False
        self.asks_needs = False
        self._kept: tuple[bool, ...] = ()
        self._keeps_rest = False
        functools.update_wrapper(self, function)

    def vjp(self, rule: Rule) -> Rule:
        """Attach the gradient rule ``rule(g, y, *args, **attributes) -> cotangents``; a decorator."""
        parameters = list(inspect.signature(rule).parameters.values())
        positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        rest = [p for p in parameters if p.kind is p.VAR_POSITIONAL]
        kept = [not p.name.startswith("_") for p in positional]
        self.rule = rule
        self.keeps_output, self._kept = kept[1], tuple(kept[2:])
        self._keeps_rest = any(not p.name.startswith("_") for p in rest)
        self.asks_needs = any(p.name == "needs" for p in parameters)
        return rule

    def kernel(self, kernel: Kernel) -> Kernel:
        """Attach a `kernel`: what the definition computes, faster, where it applies; a decorator.

        It gets the definition's arguments and the keyword `out`, memory to compute into or None; it looks at them
        itself, raises nothing that the definition would not, copies nothing, and returns a `Launch`, or None where it
        does not apply.
        """
        self.launcher = kernel
        self.function = self._launched

        def writer(*args: Any, out: Array, **attributes: Any) -> None:
            launch = kernel(*args, out=out, **attributes)
            if launch is None:
                out[...] = self.definition(*args, **attributes)
            else:
                launch.run()

        self.into(writer)
        return kernel

    def _launched(self, *args: P.args, **attributes: P.kwargs) -> Array:
        assert self.launcher is not None
        launch = self.launcher(*args, **attributes)
        return self.definition(*args, **attributes) if launch is None else launch.run()

    def into(self, writer: Callable[..., Any]) -> Callable[..., Any]:
        """Attach the same computation into given memory: ``writer(*args, out=out, **attributes)``; a decorator.

        A NumPy ufunc is one as it stands, and may write over an argument that nobody needs any more.
        """
        self.writer = writer
        self.is_elementwise = isinstance(writer, np.ufunc)
        return writer

    def select(self, arrays: list[Any]) -> list[Any]:
        """Return `arrays` with None in place of what the rule does not need."""
        rest = len(arrays) - len(self._kept)
        kept = (*self._kept, *[self._keeps_rest] * rest) if rest > 0 else self._kept
        return [array if keep else None for array, keep in zip(arrays, kept, strict=False)]

    def __call__(self, *args: P.args, **attributes: P.kwargs) -> Any:
        """Return what the function gives: an array for arrays, a recorded Tensor if any argument is one."""
        kind = None
        needs_grad = False
        arrays: list[Any] = []
        for arg in args:
            if isinstance(arg, Recorded):
                kind = type(arg)
                needs_grad = needs_grad or arg.requires_grad
                arrays.append(arg.data)
            else:
                # numpy.float64, a subclass of float, would turn float32 arrays into float64
                arrays.append(float(arg) if isinstance(arg, float) else arg)
        given: Any = args if kind is None else arrays
        output = self.function(*given, **attributes)
        if output is None:  # of a composite that no kernel computes here
            return self.definition(*args, **attributes)
        trace = tracing.get()
        if trace is not None:
            trace.add(self, given, attributes, output)
        if kind is None:
            return output
        call = None
        if needs_grad and is_recording():
            call = Call(self, args, arrays, attributes, output, kind)
        return kind.of_call(output, call)

    def __repr__(self) -> str:
        return f"<op {self.name}>"


def _one_each(made: Any, *given: Any, **_attributes: Any) -> int:
    """Return the floating-point operations of a call: one for each element of the largest array."""
    return int(max(array.size for array in (made, *given) if hasattr(array, "size")))


def op(function: Callable[P, Array]) -> Op[P]:
    """Make `function`, a pure function on arrays, an op; its rule follows with ``@name.vjp``."""
    return Op(function)
