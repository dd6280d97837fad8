"""Ranks that succeed or fail together: what is wrong on one is an error on all, at once."""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from disttrain import errors
from disttrain.checkpoint import digest
from disttrain.comm import Communicator
from disttrain.data import Batches
from disttrain.errors import CommError, DisttrainError

T = TypeVar("T")


def together(comm: Communicator, action: Callable[[], T]) -> T:
    """Run `action` on every rank and return its result; if it failed on any, raise on all.

    A rank on which it failed raises its own error; the others raise one of the same class that names the rank
    and repeats the message. Every rank must call this, at the same place.
    """
    result, failure = None, None
    try:
        result = action()
    except DisttrainError as error:
        failure = error
    reports = comm.all_gather_json(None if failure is None else [type(failure).__name__, str(failure)])
    if failure is not None:
        raise failure
    for rank, report in enumerate(reports):
        if report is not None:
            raise getattr(errors, report[0], CommError)(f"rank {rank} of {comm.world_size}: {report[1]}")
    return result  # type: ignore[return-value]


def check_equal(
    comm: Communicator, what: str, describe: Callable[[], Any], remedy: str = "every rank must be given the same"
) -> None:
    """Raise CommError on all ranks if their descriptions, JSON values, of `what` differ.

    The message shows rank 0's and that of the first rank which differs from it. A rank that is alone describes nothing.
    """
    if comm.world_size == 1:
        return
    descriptions = comm.all_gather_json(describe())
    for rank, other in enumerate(descriptions):
        if other != descriptions[0]:
            ours, theirs = _first_difference(descriptions[0], other)
            raise CommError(f"{what} differs between ranks: rank 0 has {ours}, rank {rank} has {theirs}; {remedy}")


def describe(batches: Batches, *, compared: int = 16) -> list[Any]:
    """Return what must be equal on all ranks; of the samples, the digest of `compared` ones, spread over all.

    Few are enough to notice data that were already sharded, or shuffled otherwise.
    """
    some = np.linspace(0, len(batches.x) - 1, compared).astype(np.int64)
    arrays = {"x": batches.x} if batches.y is None else {"x": batches.x, "y": batches.y}
    return [
        *([name, str(a.dtype), list(a.shape), digest({name: a[some]})[:16]] for name, a in arrays.items()),
        ["batch_size", batches.batch_size, "shuffle", batches.shuffle],
        ["seed", batches.seed],
    ]


def _first_difference(a: Any, b: Any) -> tuple[Any, Any]:
    """Return the parts of two lists that differ first; anything else as it is."""
    if isinstance(a, list) and isinstance(b, list):
        for x, y in zip(a, b, strict=False):
            if x != y:
                return x, y
        return f"{len(a)} entries", f"{len(b)} entries"
    return a, b
