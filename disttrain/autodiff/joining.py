"""What an op makes of arrays that are several arrays joined along an axis: rules for ops, one beside each.

A rule ``joined(axes, made, *given, **attributes)`` is asked about a call that was seen on the parts: `axes` says along
which axis each argument is to be joined with those of the other parts (None: all parts have the same one), `made` and
`given` are the arrays of one part, of which shape and dtype count. It returns along which axis the output then is the
parts' outputs joined, to the bit, and along which each argument must be; or None, where an element of the output
depends on several parts, or its bits on how much is computed with it.
"""

import math
from collections.abc import Callable
from typing import Any

Axes = tuple[int | None, ...]
Joined = tuple[int, Axes] | None
Rule = Callable[..., Joined]


def nowhere(_axes: Axes, _made: Any, /, *_given: Any, **_attributes: Any) -> Joined:
    """Return None: the rule of an op that is to be called for each part."""
    return None


def each(*numbers: int, inner: int = 0) -> Rule:
    """Return the rule of an op that treats what stands along some axes of its arguments `numbers` each by itself.

    All other arguments must be the same for all parts.

    Args:
        numbers: of arguments that are joined together, along the same axis; one may be missing in a call.
        inner: last axes of the first of them that the op treats together.
    """

    def rule(axes: Axes, _made: Any, /, *given: Any, **_attributes: Any) -> Joined:
        along = {axes[n] for n in numbers if n < len(axes) and axes[n] is not None}
        if len(along) != 1 or any(axis is not None for n, axis in enumerate(axes) if n not in numbers):
            return None
        (axis,) = along
        assert axis is not None
        if axis >= len(given[numbers[0]].shape) - inner:
            return None
        return axis, tuple(axis if n in numbers and _is_array(a) else None for n, a in enumerate(given))

    return rule


def elementwise(axes: Axes, made: Any, /, *given: Any, **_attributes: Any) -> Joined:
    """Return what the rule of an op does that works element by element on arguments that broadcast."""
    ndim = len(made.shape)
    along = {axis + ndim - len(a.shape) for axis, a in zip(axes, given, strict=True) if axis is not None}
    if len(along) != 1:
        return None
    (axis,) = along
    wanted: list[int | None] = []
    for own, a in zip(axes, given, strict=True):
        at = axis + len(a.shape) - ndim if _is_array(a) else -1
        broadcasts = at < 0 or (own is None and a.shape[at] == 1)
        if not broadcasts and a.shape[at] != made.shape[axis]:
            return None
        wanted.append(None if broadcasts else at)
    return axis, tuple(wanted)


def reduced(
    axes: Axes, _made: Any, x: Any, /, *, axis: Any = None, keepdims: bool = False, **_attributes: Any
) -> Joined:
    """Return what the rule of a reduction does: only along the first axis, which all parts have outermost in memory.

    Then each of the sums has one order, whatever stands beside it.
    """
    over = range(len(x.shape)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    return (0, (0,)) if axes == (0,) and not {0, -len(x.shape)} & set(over) else None


def reshaped(axes: Axes, made: Any, x: Any, /, **_attributes: Any) -> Joined:
    """Return what the rule of a reshape does: a part stays in one piece where as much stands before it."""
    (axis,) = axes
    assert axis is not None
    before = math.prod(x.shape[:axis])
    found = [i for i in range(len(made.shape)) if math.prod(made.shape[:i]) == before]
    return (found[0], axes) if found else None


def broadcast(axes: Axes, made: Any, x: Any, /, **_attributes: Any) -> Joined:
    """Return what the rule of a broadcast does, where it is not along the axis itself."""
    (own,) = axes
    assert own is not None
    axis = own + len(made.shape) - len(x.shape)
    return (axis, axes) if made.shape[axis] == x.shape[own] else None


def picked(axes: Axes, _made: Any, x: Any, /, *, index: Any) -> Joined:
    """Return what the rule of an index does: of numbers, and slices that leave the axis whole."""
    (axis,) = axes
    kept = _kept(index, len(x.shape))
    return (kept.index(axis), axes) if axis in kept else None


def put(axes: Axes, made: Any, _x: Any, /, *, index: Any, **_attributes: Any) -> Joined:
    """Return what the rule of the adjoint of an index does."""
    (axis,) = axes
    assert axis is not None
    kept = _kept(index, len(made.shape))
    at = kept[axis] if axis < len(kept) else -1
    return None if at < 0 else (at, axes)


def transposed(along: Axes, _made: Any, x: Any, /, *, axes: Any = None) -> Joined:
    """Return what the rule of a transpose does: the first axis stays the first, outermost in memory."""
    return (0, along) if along == (0,) and axes is not None and axes[0] % len(x.shape) == 0 else None


def beside(axes: Axes, made: Any, /, *given: Any, axis: int) -> Joined:
    """Return what the rule of an op that works along one `axis`, as a concatenation, does along another."""
    return None if axis % len(made.shape) in axes else each(*range(len(given)))(axes, made, *given)


def _kept(index: Any, ndim: int) -> list[int]:
    """Return, for each axis of ``x[index]``, which axis of `x` it is; -1 for one that is not whole."""
    parts = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(part, int | slice) for part in parts):
        return []
    parts = (*parts, *[slice(None)] * (ndim - len(parts)))
    return [i if part == slice(None) else -1 for i, part in enumerate(parts) if isinstance(part, slice)]


def _is_array(given: Any) -> bool:
    return hasattr(given, "shape")
