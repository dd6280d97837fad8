"""Elementwise functions in one pass: cpu/elementwise.cpp."""

import numpy as np

from disttrain.backend import Array
from disttrain.kernels.library import Launch, address, applies_to, native, new_array

_FEWEST = 1 << 14  # elements: below, NumPy's two calls cost no more than preparing this one


def where_positive(g: Array, y: Array, *, out: Array | None = None) -> Launch | None:
    """Compute `g` where `y` is positive, else ``g * 0``; None where no kernel applies."""
    if type(g) is not np.ndarray or g.size < _FEWEST:
        return None
    compute = native("where_positive")
    if compute is None or not applies_to(g, y) or g.shape != y.shape:
        return None
    out = new_array(g.shape, out)
    return Launch(compute, (g.size, address(g), address(y), address(out)), out)


def silu(x: Array, *, out: Array | None = None) -> Launch | None:
    """Compute what the op `silu` returns; None where it does not apply: see `disttrain.kernels`."""
    return _of("silu", x, out=out)


def silu_gradient(g: Array, _y: Array, x: Array, *, out: Array | None = None) -> Launch | None:
    """Compute the gradient of `silu`; None where it does not apply."""
    return _of("silu_gradient", g, x, out=out)


def softplus(x: Array, *, out: Array | None = None) -> Launch | None:
    """Compute what the op `softplus` returns; None where it does not apply."""
    return _of("softplus", x, out=out)


def softplus_gradient(g: Array, x: Array, *, out: Array | None = None) -> Launch | None:
    """Compute the gradient of `softplus`; None where it does not apply."""
    return _of("softplus_gradient", g, x, out=out)


def _of(name: str, *arrays: Array, out: Array | None) -> Launch | None:
    """Compute the function `name` of arrays of one shape; None where it does not apply."""
    compute = native(name)
    if compute is None or not applies_to(*arrays) or len({a.shape for a in arrays}) > 1:
        return None
    out = new_array(arrays[0].shape, out)
    return Launch(compute, (arrays[0].size, *map(address, arrays), address(out)), out)
