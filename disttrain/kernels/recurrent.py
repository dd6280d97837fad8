"""Recurrent layers over whole sequences and their gradients: cpu/recurrent.cpp."""

import ctypes
import itertools
from typing import Any

from disttrain.backend import Array
from disttrain.kernels.library import Launch, address, applies_to, native, new_array

_GATES = {"lstm": 4, "gru": 3}


class _Recurrence(ctypes.Structure):
    """As in cpu/recurrent.cpp."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("samples", "steps", "features", "units"))


def sequence(
    name: str, x: Array, kernel: Array, recurrent_kernel: Array, bias: Array, *, out: Array | None = None
) -> Launch | None:
    """Compute what the op `name`, lstm or gru, returns; None where it does not apply: see `disttrain.kernels`."""
    args = x, kernel, recurrent_kernel, bias
    compute, described = native(name), _described(name, *args)
    if compute is None or described is None:
        return None
    out = new_array((*x.shape[:2], described.units), out)
    return Launch(compute, (ctypes.byref(described), *map(address, args), address(out)), out)


def gradients(
    name: str, of_x: bool, g: Array, y: Array, x: Array, kernel: Array, recurrent_kernel: Array, bias: Array, *,
    out: Array | None = None,
) -> Launch | None:  # fmt: skip
    """Compute the gradients of the op `name` in all arguments, or all but `x`; None where no kernel applies."""
    args = x, kernel, recurrent_kernel, bias
    compute, described = native(f"{name}_gradients"), _described(name, *args)
    if compute is None or described is None or not applies_to(g, y) or g.shape != y.shape:
        return None
    asked = args if of_x else args[1:]
    alike = len({a.shape for a in asked}) == 1
    out = new_array((len(asked), *asked[0].shape) if alike else (sum(a.size for a in asked),), out)
    ends = itertools.accumulate((a.nbytes for a in asked[:-1]), initial=address(out))
    places = (*ends,) if of_x else (None, *ends)
    return Launch(compute, (ctypes.byref(described), *map(address, (g, y, *args)), *places), out)


def _described(name: str, x: Array, kernel: Array, recurrent_kernel: Array, bias: Array) -> Any:
    """Return what the kernels know of the arguments; None where they do not apply."""
    gates = _GATES[name]
    if not applies_to(x, kernel, recurrent_kernel, bias) or x.ndim != 3 or recurrent_kernel.ndim != 2:
        return None
    (samples, steps, features), units = x.shape, recurrent_kernel.shape[0]
    row = gates * units
    of_bias = (2, row) if name == "gru" else (row,)
    if min(steps, features, units) < 1:
        return None
    if kernel.shape != (features, row) or recurrent_kernel.shape != (units, row) or bias.shape != of_bias:
        return None
    return _Recurrence(samples, steps, features, units)
