"""Functions that make functions: `value_and_grad`, `grad`."""

import functools
from collections.abc import Callable
from typing import Any

from disttrain.autodiff import ops
from disttrain.autodiff.backward import gradients
from disttrain.autodiff.op import Recorded, is_recording
from disttrain.autodiff.tensor import Tensor
from disttrain.backend import Array, get_array_module
from disttrain.errors import AutodiffError


def value_and_grad(function: Callable[..., Any], argnums: int | tuple[int, ...] = 0) -> Callable[..., tuple[Any, Any]]:
    """Return a function that gives the value of `function` and its gradient in some arguments.

    Called with arrays it returns arrays. Called with Tensors it returns Tensors and records what it does, so
    that it can be differentiated again: ``grad(grad(f))``.

    Args:
        function: takes arrays or Tensors, returns a scalar Tensor.
        argnums: which positional arguments to differentiate in; a tuple gives a tuple of gradients.

    Raises:
        AutodiffError: the value is not a scalar Tensor, or nothing is recorded here.
    """
    numbers = (argnums,) if isinstance(argnums, int) else argnums

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if not is_recording():
            raise AutodiffError("a gradient was asked for under no_grad(), where nothing is recorded; leave that first")
        record = any(isinstance(a, Recorded) for a in args)
        inner = [_fresh(a) if i in numbers else a for i, a in enumerate(args)]
        value = function(*inner, **kwargs)
        if not isinstance(value, Tensor) or value.size != 1:
            what = f"shape {value.shape}" if isinstance(value, Tensor) else type(value).__name__
            raise AutodiffError(f"a function to differentiate returns a scalar Tensor, not {what}")
        nodes = [inner[i].call or inner[i] for i in numbers]
        found = gradients(value, nodes, record=record) if value.requires_grad else [
            ops.multiply(inner[i].data, 0) for i in numbers
        ]  # fmt: skip
        if record:
            found = [g if isinstance(g, Tensor) else Tensor(g) for g in found]
        else:  # copies: a gradient may be a view that cannot be written, or the same array as another
            found = [get_array_module(g).array(g) for g in found]
        result = found[0] if isinstance(argnums, int) else tuple(found)
        return value if record else value.data, result

    return wrapped


def grad(function: Callable[..., Any], argnums: int | tuple[int, ...] = 0) -> Callable[..., Any]:
    """Return a function that gives the gradient of `function`; see `value_and_grad`."""
    both = value_and_grad(function, argnums)

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return both(*args, **kwargs)[1]

    return wrapped


def _fresh(x: Array) -> Tensor:
    """Return a Tensor of the value of `x` to differentiate in, still recorded as depending on `x`."""
    if isinstance(x, Tensor) and x.requires_grad:
        return ops.reshape(x, shape=x.shape)  # type: ignore[no-any-return]
    return Tensor(x, requires_grad=True)
