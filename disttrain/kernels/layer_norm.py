"""Layer normalization and its gradients: cpu/layer_norm.cpp."""

import math

from disttrain.backend import Array
from disttrain.kernels.library import Launch, address, applies_to, native, new_array


def layer_norm(
    x: Array, gamma: Array, beta: Array, *, epsilon: float, out: Array | None = None
) -> Launch | None:  # fmt: skip
    """Compute what the op `layer_norm` returns; None where it does not apply: see `disttrain.kernels`."""
    compute = native("layer_norm")
    if compute is None or not applies_to(x, gamma, beta) or not _fit(x, gamma, beta):
        return None
    out = new_array(x.shape, out)
    return Launch(compute, (*_rows(x), address(x), address(gamma), address(beta), epsilon, address(out)), out)


def layer_norm_input(
    g: Array, _y: Array, x: Array, gamma: Array, _beta: Array, *, epsilon: float, out: Array | None = None
) -> Launch | None:
    """Compute the gradient of `layer_norm` in `x`; None where it does not apply."""
    compute = native("layer_norm_input")
    if compute is None or not applies_to(g, x, gamma) or not _fit(x, gamma) or g.shape != x.shape:
        return None
    out = new_array(x.shape, out)
    return Launch(compute, (*_rows(x), address(g), address(x), address(gamma), epsilon, address(out)), out)


def layer_norm_scale(
    g: Array, _y: Array, x: Array, gamma: Array, beta: Array, *, epsilon: float, out: Array | None = None
) -> Launch | None:
    """Compute the gradients of `layer_norm` in `gamma` and `beta`, stacked; None where it does not apply."""
    compute = native("layer_norm_scale")
    if compute is None or not applies_to(g, x, gamma, beta) or not _fit(x, gamma, beta) or g.shape != x.shape:
        return None
    out = new_array((2, *gamma.shape), out)
    return Launch(compute, (*_rows(x), address(g), address(x), epsilon, address(out)), out)


def _fit(x: Array, *channels: Array) -> bool:
    """Return whether each of `channels` has one number for each column of `x`, and there are some."""
    return x.ndim > 0 and x.shape[-1] > 0 and all(a.shape == x.shape[-1:] for a in channels)


def _rows(x: Array) -> tuple[int, int]:
    return math.prod(x.shape[:-1]), x.shape[-1]
