"""Backward: cotangents flow from an output through the recorded calls, latest first."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from disttrain.autodiff.op import Call, Recorded, array_of, no_grad, tracing
from disttrain.autodiff.ops.elementwise import cast
from disttrain.autodiff.ops.shape import sum_to
from disttrain.backend import Array, get_array_module
from disttrain.errors import AutodiffError, ShapeError

Deliver = Callable[[Any, Array], None]


def backward(output: Recorded, gradient: Array = None, *, deliver: Deliver, retain_graph: bool = False) -> None:
    """Compute the gradient of `output` in every leaf behind it that requires one.

    Args:
        output: a scalar, or any shape if `gradient` is given.
        gradient: the cotangent of `output`, of its shape.
        deliver: called with each leaf and its gradient, an array, as soon as that is final; in an order
            that depends on the recorded calls only, so the same on ranks that run the same model.
        retain_graph: keep the graph for another backward; else its memory is dropped on the way.

    Raises:
        AutodiffError: nothing was recorded, `output` is not a scalar, or the graph was freed.
    """
    if not output.requires_grad:
        raise AutodiffError(
            "backward() on a Tensor that requires no gradient: no Tensor behind it has "
            "requires_grad=True, or it was computed under no_grad()"
        )
    start = _first_cotangent(output, gradient)
    record = tracing.get() is not None  # rules are then applied to Tensors, so that every call is seen
    root = output.call or output
    calls = _calls_behind(root)
    uses = Counter(id(n) for c in calls for n in c.inputs if isinstance(n, Recorded))
    cotangents: dict[int, Array] = {id(root): output.of_call(start, None) if record else start}
    if isinstance(root, Recorded):
        deliver(root, start)
    while calls:
        call = calls.pop()  # the latest
        with no_grad() if record else contextlib.nullcontext():
            pulled = _pull(call, cotangents.pop(id(call), None), record=record)
        for node, cotangent in zip(call.inputs, pulled, strict=True):
            if node is None:
                continue
            with no_grad() if record else contextlib.nullcontext():
                _accumulate(cotangents, node, cotangent)
            if isinstance(node, Recorded):
                uses[id(node)] -= 1
                if uses[id(node)] == 0:
                    final = cotangents.pop(id(node), None)
                    deliver(
                        node, get_array_module(node.data).zeros_like(node.data) if final is None else array_of(final)
                    )
        if not retain_graph:
            call.release()


def gradients(output: Recorded, nodes: list[Any], *, record: bool, cotangent: Array = None) -> list[Array]:
    """Return the gradient of `output` in each of `nodes`, none of which depends on another.

    Args:
        output: what is differentiated: a scalar, or any shape if `cotangent` is given.
        nodes: leaves, or the calls that made the Tensors in question.
        record: whether to record the computation; then the gradients are Tensors.
        cotangent: of `output`, of its shape.
    """
    if cotangent is None:
        cotangent = _first_cotangent(output, None)
    if record and not isinstance(cotangent, Recorded):
        cotangent = output.of_call(cotangent, None)
    root = output.call or output
    cotangents: dict[int, Array] = {id(root): cotangent}
    wanted = {id(node) for node in nodes}
    calls = _calls_behind(root, stop=wanted)
    while calls:
        call = calls.pop()
        pulled = _pull(call, cotangents.pop(id(call), None), record=record)
        for node, cotangent in zip(call.inputs, pulled, strict=True):
            if isinstance(node, Call) or id(node) in wanted:
                _accumulate(cotangents, node, cotangent)
    found = [cotangents.get(id(node)) for node in nodes]
    xp = get_array_module(output.data)
    return [xp.zeros(n.shape, n.dtype) if g is None else g for n, g in zip(nodes, found, strict=True)]


def leaves(output: Recorded) -> list[Any]:
    """Return the leaves behind `output` that requires a gradient, each once, in no special order."""
    root = output.call or output
    found = {id(n): n for c in _calls_behind(root) for n in c.inputs if isinstance(n, Recorded)}
    return list(found.values())


def _first_cotangent(output: Recorded, gradient: Array) -> Array:
    data = output.data
    xp = get_array_module(data)
    if gradient is None:
        if data.size != 1:
            raise AutodiffError(
                f"backward() starts at a scalar, this Tensor has shape {data.shape}; "
                "reduce it, as by .mean(), or give the cotangent: backward(gradient)"
            )
        return xp.ones(data.shape, data.dtype)
    gradient = xp.asarray(getattr(gradient, "data", gradient) if isinstance(gradient, Recorded) else gradient)
    if gradient.shape != data.shape:
        raise ShapeError(f"gradient of shape {gradient.shape} for a Tensor of shape {data.shape}")
    return gradient.astype(data.dtype)


def _calls_behind(root: Any, stop: Iterable[int] = ()) -> list[Call]:
    """Return the calls behind `root`, itself included, ordered by number; nothing behind `stop`.

    A call's number is larger than those of the calls it depends on, so from the last to the first each
    call comes after all that use its output.
    """
    seen = set(stop)
    found: list[Call] = []
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if isinstance(node, Call) and id(node) not in seen:
            seen.add(id(node))
            found.append(node)
            waiting.extend(node.inputs)
    found.sort(key=lambda call: call.number)
    return found


def _pull(call: Call, g: Array, *, record: bool) -> tuple[Array, ...]:
    """Return the cotangents of the call's arguments, each of its argument's shape and dtype."""
    if g is None:  # only ways that have no gradient lead here
        return (None,) * len(call.inputs)
    pulled = call.pull_back(g, record=record)
    if len(pulled) != len(call.inputs):
        raise AutodiffError(
            f"the rule of op {call.op.name!r} gave {len(pulled)} cotangents for {len(call.inputs)} array arguments"
        )
    return tuple(
        None if node is None or cotangent is None else _fit(cotangent, node, call)
        for node, cotangent in zip(call.inputs, pulled, strict=True)
    )


def _fit(cotangent: Array, node: Any, call: Call) -> Array:
    """Return `cotangent` summed over broadcast axes and cast to what `node`, an argument of `call`, is."""
    like = node.data if isinstance(node, Recorded) else node
    if not hasattr(cotangent, "shape"):
        raise AutodiffError(
            f"the rule of op {call.op.name!r} gave a {type(cotangent).__name__}; a cotangent is an array, or None"
        )
    if cotangent.shape != like.shape:
        if not _broadcasts(like.shape, cotangent.shape):
            raise AutodiffError(
                f"the rule of op {call.op.name!r} gave a cotangent of shape {cotangent.shape} for an argument of "
                f"shape {like.shape}; it must have the argument's shape, or the one that it was broadcast to"
            )
        cotangent = sum_to(cotangent, shape=like.shape)
    if cotangent.dtype != like.dtype:
        cotangent = cast(cotangent, dtype=like.dtype)
    return cotangent


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Return whether an array of `shape` broadcasts to the shape `to`."""
    ends = to[len(to) - len(shape) :]
    return len(shape) <= len(to) and all(n in (1, end) for n, end in zip(shape, ends, strict=True))


def _accumulate(cotangents: dict[int, Array], node: Any, cotangent: Array) -> None:
    if cotangent is None:
        return
    held = cotangents.get(id(node))
    # not in place: a rule may hand the same array to two arguments
    cotangents[id(node)] = cotangent if held is None else held + cotangent
