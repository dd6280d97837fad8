"""Values over all ranks that are no gradients: sums within a step, and the weights that all begin with."""

from collections.abc import Callable, Sequence
from typing import Any

from disttrain.autodiff import Tensor, op
from disttrain.backend import Array, get_array_module
from disttrain.comm import Communicator


def total_over(comm: Communicator) -> Callable[[Any], Any]:
    """Return the function that sums an array or Tensor over all ranks of `comm`, differentiably."""
    return lambda x: _all_reduce(x, comm=comm)


@op
def _all_reduce(x: Array, *, comm: Communicator) -> Array:
    return comm.all_reduce(get_array_module(x).array(x))


@_all_reduce.into
def _(x: Array, out: Array, *, comm: Communicator) -> None:
    out[...] = x
    comm.all_reduce(out)


@_all_reduce.vjp
def _(g: Array, _y: Array, _x: Array, *, comm: Communicator) -> tuple[Array, ...]:
    # every rank's loss depends on the sum, and what is differentiated is the sum of all ranks' losses
    return (_all_reduce(g, comm=comm),)


def broadcast_weights(comm: Communicator, weights: Sequence[Tensor]) -> None:
    """Give every rank the values that rank 0 has."""
    for weight in weights:
        comm.broadcast(weight.data)
