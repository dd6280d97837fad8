"""A composite: a function of ops, which is its definition, with kernels that compute it and its gradient in one pass.

Where its kernel applies, a call of it is one recorded call; elsewhere the definition's ops are called as if nobody had
written a kernel. Its gradient is a composite too, whose definition is what backward makes of those ops: so a kernel may
be missing anywhere, gradients of gradients follow, and every kernel has something to be compared with.
"""

import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any, Optional, ParamSpec

from disttrain.autodiff.op import Kernel, Op, Recorded, Rule, array_of, is_recording, recording
from disttrain.backend import Array

P = ParamSpec("P")


class Composite(Op[P]):
    """A function of ops that kernels may compute. Made by the decorator `composite`."""

    def __init__(self, definition: Callable[P, Any], gradient_of: Optional["Composite[Any]"] = None) -> None:
        super().__init__(definition)
        self.function = _no_kernel
        self.rule = self._rule
        self.asks_needs = True
        self._keeps_rest = True
        self._gradient_of = gradient_of
        self._gradients: dict[tuple[int, ...], Composite[Any]] = {}
        self._pull: Rule | None = None

    def kernel(self, kernel: Kernel) -> Kernel:
        """Attach a kernel, as to an op; a decorator.

        The kernel of a gradient that names its second parameter ``_y`` does not need the output, which then is not
        kept until backward.
        """
        self._ask_for_output(kernel)
        return super().kernel(kernel)

    def fused(self, function: Callable[..., Array]) -> Callable[..., Array]:
        """Attach a function of arrays that computes the same by other ops, or returns None; a decorator.

        What `kernel` is for one call of native code, this is for several: a plan sees the ops.
        """
        self._ask_for_output(function)
        self.function = function
        return function

    def pull(self, rule: Rule) -> Rule:
        """Attach a rule, as `Op.vjp` does, that computes all cotangents together by other ops; a decorator.

        It may take what it computes from arguments to be constant: for gradients of gradients the definition serves.
        """
        self._pull = rule
        return rule

    def gradient(self, *numbers: int) -> "Composite[Any]":
        """Return the composite ``(g, y, *args, **attributes)`` of the cotangents of the arguments `numbers`.

        Of one argument it is the cotangent; of several, all of them, stacked where they are of one shape, else flat,
        one behind the other.
        """

        def cotangents(g: Array, _y: Array, *args: Any, **attributes: Any) -> Array:
            return _pulled_back(self.definition, numbers, g, args, attributes)

        cotangents.__name__ = f"{self.name}_gradient"
        return self._gradients.setdefault(numbers, Composite(cotangents, gradient_of=self))

    def _ask_for_output(self, kernel: Callable[..., Any]) -> None:
        if self._gradient_of is not None and not list(inspect.signature(kernel).parameters)[1].startswith("_"):
            self._gradient_of.keeps_output = True

    def _launched(self, *args: P.args, **attributes: P.kwargs) -> Array:
        assert self.launcher is not None
        launch = self.launcher(*args, **attributes)
        return None if launch is None else launch.run()

    def _rule(
        self, g: Array, y: Array, *args: Array, needs: tuple[bool, ...], **attributes: Any
    ) -> tuple[Array, ...]:  # fmt: skip
        differentiated = is_recording() and any(isinstance(a, Recorded) and a.requires_grad for a in (g, *args))
        if self._pull is not None and not differentiated:
            return self._pull(g, y, *args, needs=needs, **attributes)
        found: list[Array] = [None] * len(args)
        for number, needed in enumerate(needs):
            if not needed or found[number] is not None:
                continue
            groups = [held for held in self._gradients if number in held] or [(number,)]
            # one that computes only what is needed, if there is such
            numbers = next((held for held in groups if all(needs[n] for n in held)), groups[0])
            cotangents = self.gradient(*numbers)(g, y, *args, **attributes)
            for n, part in zip(numbers, _parts(cotangents, [args[n].shape for n in numbers]), strict=True):
                found[n] = part
        return tuple(found)


def composite(function: Callable[P, Any]) -> Composite[P]:
    """Make `function`, a function of ops, a composite; kernels follow: ``name.kernel``, ``name.gradient(0).kernel``."""
    return Composite(function)


def _no_kernel(*_args: Any, **_attributes: Any) -> None:
    """Compute nothing."""


def _pulled_back(
    definition: Callable[..., Any], numbers: tuple[int, ...], g: Array, args: tuple[Any, ...],
    attributes: dict[str, Any],
) -> Array:  # fmt: skip
    """Return what backward makes of `definition` and `g` for the arguments `numbers`; in one array if several."""
    # not at the top: ops are composites
    from disttrain.autodiff import ops
    from disttrain.autodiff.backward import gradients
    from disttrain.autodiff.tensor import Tensor

    given = list(args)
    for n in numbers:
        if (
            isinstance(args[n], Recorded) and args[n].requires_grad and is_recording()
        ):  # what is returned is to be differentiated in turn
            given[n] = ops.reshape(args[n], shape=args[n].shape)  # a node of its own: an argument may be given twice
        else:
            given[n] = Tensor(array_of(args[n]), requires_grad=True)
    with recording():
        y = definition(*given, **attributes)
    record = any(isinstance(a, Recorded) for a in (g, *args))
    found = gradients(y, [given[n].call or given[n] for n in numbers], record=record, cotangent=g)
    return _joined(found)


def _joined(cotangents: list[Array]) -> Array:
    """Return `cotangents` as a gradient's kernel gives them."""
    from disttrain.autodiff import ops

    if len(cotangents) == 1:
        return cotangents[0]
    if len({each.shape for each in cotangents}) == 1:
        return ops.stack(cotangents)
    return ops.concatenate([ops.reshape(each, shape=(-1,)) for each in cotangents])


def _parts(joined: Array, shapes: list[tuple[int, ...]]) -> list[Array]:
    """Return the cotangents, of `shapes`, that `_joined` has put into one array."""
    if len(shapes) == 1:
        return [joined]
    if len(set(shapes)) == 1:
        return [joined[i] for i in range(len(shapes))]
    ends = list(itertools.accumulate(map(math.prod, shapes)))
    return [joined[end - math.prod(shape) : end].reshape(shape) for shape, end in zip(shapes, ends, strict=True)]
