"""float32 as fewer bytes, and back, in one pass: cpu/casts.cpp."""

from typing import Any

import numpy as np

from disttrain.backend import Array
from disttrain.kernels.library import address, applies_to, native


def encode(name: str, values: Array, encoded: Array) -> bool:
    """Write `values` to `encoded`, bytes, as `name`; return False, with nothing changed, where no kernel applies.

    Args:
        name: ``"bfloat16"``, ``"float16"`` or ``"int8"``.
        values: shape ``(n,)``.
        encoded: uint8, as many as the encoding of `values` has.
    """
    compute = _kernel(f"encode_{name}", values, encoded)
    if compute is not None:
        compute(values.size, address(values), address(encoded))
    return compute is not None


def decode(name: str, encoded: Array, values: Array) -> bool:
    """Write to `values` what `encoded` holds; else as `encode`."""
    return _into(f"decode_{name}", encoded, values)


def add(name: str, encoded: Array, values: Array) -> bool:
    """Add to `values` what `encoded` holds; else as `encode`."""
    return _into(f"add_{name}", encoded, values)


def _into(function: str, encoded: Array, values: Array) -> bool:
    compute = _kernel(function, values, encoded)
    if compute is not None:
        compute(values.size, address(encoded), address(values))
    return compute is not None


def _kernel(function: str, values: Array, encoded: Array) -> Any:
    compute = native(function)
    if compute is None or not applies_to(values) or encoded.dtype != np.uint8 or address(encoded) % 4:
        return None
    return compute
