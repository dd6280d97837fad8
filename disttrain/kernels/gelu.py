"""GELU and its gradient in one pass: cpu/gelu.cpp."""

from disttrain.backend import Array
from disttrain.kernels.library import Launch, address, applies_to, native, new_array


def gelu(x: Array, *, approximate: bool = False, out: Array | None = None) -> Launch | None:
    """Compute what the op `gelu` returns; None where it does not apply: see `disttrain.kernels`."""
    compute = native("gelu")
    if compute is None or not applies_to(x):
        return None
    out = new_array(x.shape, out)
    return Launch(compute, (x.size, bool(approximate), address(x), address(out)), out)


def gelu_gradient(
    g: Array, _y: Array, x: Array, *, approximate: bool = False, out: Array | None = None
) -> Launch | None:  # fmt: skip
    """Compute the gradient of `gelu`; None where it does not apply."""
    compute = native("gelu_gradient")
    if compute is None or not applies_to(g, x) or g.shape != x.shape:
        return None
    out = new_array(x.shape, out)
    return Launch(compute, (x.size, bool(approximate), address(g), address(x), address(out)), out)
