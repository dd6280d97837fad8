"""Values over all ranks that are no gradients: sums within a step, and the weights that all begin with."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from disttrain.autodiff import Tensor
from disttrain.comm import Communicator, functional


def total_over(comm: Communicator) -> Callable[[Any], Any]:
    """Return the function that sums an array or Tensor over all ranks of `comm`, differentiably."""
    return partial(functional.total, comm=comm)


def broadcast_weights(comm: Communicator, weights: Sequence[Tensor]) -> None:
    """Give every rank the values that rank 0 has."""
    for weight in weights:
        comm.broadcast(weight.data)
