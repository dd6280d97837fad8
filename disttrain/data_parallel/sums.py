"""Values over all ranks that are no gradients: sums within a step, and the weights that all begin with."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from disttrain.autodiff import Tensor
from disttrain.comm import Communicator, functional
from disttrain.comm.functional import Summed


def total_over(comm: Summed) -> Callable[[Any], Any]:
    """Return the function that sums an array or Tensor over all parts of `comm`, differentiably."""
    return partial(functional.total, comm=comm)


def broadcast_weights(comm: Communicator, weights: Sequence[Tensor]) -> None:
    """Give every rank the values that rank 0 has."""
    for weight in weights:
        comm.broadcast(weight.data)
