"""Masks: which steps of sequences count. A mask follows the Tensor that it is of, from layer to layer.

A layer makes, passes on or drops one by `Layer.compute_mask`. It is an array or Tensor of bool, ``(samples, steps)``.
"""

import weakref
from typing import Any

from disttrain.observe import log

_masks: dict[int, tuple[weakref.ref[Any], Any]] = {}  # by the Tensor's id: Tensors compare element by element
_warned: "weakref.WeakSet[Any]" = weakref.WeakSet()


def mask_of(x: Any) -> Any:
    """Return the mask of a Tensor, None where it has none."""
    held = _masks.get(id(x))
    return held[1] if held is not None and held[0]() is x else None


def put_mask(x: Any, mask: Any) -> None:
    """Make `mask` that of the Tensor `x`."""
    key = id(x)

    def forget(reference: weakref.ref[Any]) -> None:
        if key in _masks and _masks[key][0] is reference:
            del _masks[key]

    _masks[key] = weakref.ref(x, forget), mask


def warn_that_it_ends(layer: Any) -> None:
    """Say once that what `layer` gives has no mask, though what it was given had one."""
    if layer not in _warned:
        _warned.add(layer)
        log.warning(
            "layer %r (%s) does not know masks: it uses steps that are to be left out, and what follows has no mask",
            layer.path,
            type(layer).__name__,
        )
