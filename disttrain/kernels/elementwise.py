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
