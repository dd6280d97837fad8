"""Ranks that succeed or fail together: what is wrong on one is an error on all, at once."""

import functools
import hashlib
import platform
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np

from disttrain import env, errors
from disttrain.backend import seed
from disttrain.comm import Communicator
from disttrain.data import Batches
from disttrain.errors import CommError, DisttrainError
from disttrain.kernels.library import chosen
from disttrain.kernels.precision import get_matmul_precision

T = TypeVar("T")

_PACKAGE = Path(__file__).parent.parent


class Fact(NamedTuple):
    """Something that must be equal on all ranks.

    Attributes:
        what: it is, as an error begins.
        value: of JSON.
        remedy: what to do where it differs.
    """

    what: str
    value: Any
    remedy: str = "every rank must be given the same"


def together(comm: Communicator, action: Callable[[], T], facts: Callable[[T], list[Fact]] = lambda result: []) -> T:
    """Run `action` on every rank and return its result; raise on all if it failed on any, or if `facts` differ.

    A rank on which it failed raises its own error; the others raise one of the same class that names the rank
    and repeats the message. Every rank must call this, at the same place.

    Args:
        comm: the ranks; one that is alone describes nothing.
        action: what may fail.
        facts: describes, of the result, what must be equal.

    Raises:
        CommError: facts differ; shows rank 0's, and that of the first rank which differs from it.
    """
    if comm.world_size == 1:
        return action()
    result, failure, described = None, None, list[Fact]()
    try:
        result = action()
        described = facts(result)
    except DisttrainError as error:
        failure = error
    # Most often all is well, and three numbers show it: within a host they need no message.
    sign = _sign([fact.value for fact in described])
    seen = comm.all_reduce(np.array([float(failure is not None), sign, -sign]), "max", name="what ranks agree on")
    failed, highest, lowest = seen.tolist()
    if failed:
        _raise_failure(comm, failure)
    if highest != -lowest:
        _raise_difference(comm, described)
    return result  # type: ignore[return-value]


def check_equal(
    comm: Communicator, what: str, describe: Callable[[], Any], remedy: str = "every rank must be given the same"
) -> None:
    """Raise CommError on all ranks if their descriptions, JSON values, of `what` differ; as `check_facts`."""
    check_facts(comm, lambda: [Fact(what=what, value=describe(), remedy=remedy)])


def check_facts(comm: Communicator, describe: Callable[[], list[Fact]]) -> None:
    """Raise CommError on all ranks if any of the facts that they describe differ: the first one, by one exchange."""
    together(comm, lambda: None, lambda _: describe())


def _sign(values: list[Any]) -> float:
    """Return a number that differs where `values` do, exact in a float64: two checksums, of 32 and of 16 bits."""
    data = repr(values).encode()
    return float(zlib.crc32(data) << 16 | zlib.adler32(data) & 0xFFFF)


def _raise_failure(comm: Communicator, failure: DisttrainError | None) -> NoReturn:
    """Raise on all ranks what has failed on some: `failure`, if that was here."""
    reports = comm.all_gather_json(None if failure is None else [type(failure).__name__, str(failure)])
    if failure is not None:
        raise failure
    rank, (kind, text) = next((rank, report) for rank, report in enumerate(reports) if report is not None)
    raise getattr(errors, kind, CommError)(f"rank {rank} of {comm.world_size}: {text}")


def _raise_difference(comm: Communicator, facts: list[Fact]) -> None:
    """Raise on all ranks that facts differ, if it was not only their words."""
    values = comm.all_gather_json([fact.value for fact in facts])
    for number, fact in enumerate(facts):
        for rank, others in enumerate(values):
            if others[number] != values[0][number]:
                ours, theirs = _first_difference(values[0][number], others[number])
                raise CommError(
                    f"{fact.what} differs between ranks: rank 0 has {ours}, rank {rank} has {theirs}; {fact.remedy}"
                )


def circumstances() -> list[Fact]:
    """Return what decides, beside model and data, what a step computes: to the last bit, and by which code."""
    kernels = chosen().name
    return [
        Fact(
            what="the code of disttrain",
            value=code_digest(),
            remedy="install the same version of disttrain for every rank",
        ),
        Fact(
            what="a version",
            value=[["Python", platform.python_version()], ["numpy", np.__version__]],
            remedy="every rank must run in the same environment",
        ),
        Fact(
            what="the instruction set of the kernels",
            value=kernels,
            remedy=f"set {env.KERNELS} to one that all hosts have, or replicas would differ in their last bits",
        ),
        Fact(
            what="the precision of matrix products",
            value=get_matmul_precision(),
            remedy="set_matmul_precision() must be given the same on every rank",
        ),
        Fact(what="the seed", value=seed(), remedy="set_random_seed() must be given the same on every rank"),
    ]


@functools.cache
def code_digest() -> str:
    """Return a digest of disttrain's own sources, of which another version may compute something else."""
    total = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*")):
        if path.suffix in (".py", ".cpp", ".h"):
            data = path.read_bytes()
            total.update(f"{path.relative_to(_PACKAGE)} {len(data)} ".encode() + data)
    return total.hexdigest()[:16]


def describe(batches: Batches, *, compared: int = 16) -> list[Any]:
    """Return what must be equal on all ranks; of the samples, checksums of `compared` ones, spread over all.

    Few are enough to notice data that were already sharded, or shuffled otherwise.
    """
    last = len(batches.x) - 1
    some = [last * number // (compared - 1) for number in range(compared)]
    arrays = [("x", batches.x)] if batches.y is None else [("x", batches.x), ("y", batches.y)]
    return [
        *([name, _dtype_name(a.dtype), a.shape, *[_checksum(a[i : i + 1]) for i in some]] for name, a in arrays),
        ["batch_size", batches.batch_size, "shuffle", batches.shuffle],
        ["seed", batches.seed],
    ]


_dtype_name = functools.cache(str)  # NumPy makes it anew each time: 3 us


def _checksum(array: np.ndarray[Any, Any]) -> int:
    return zlib.crc32(np.ascontiguousarray(array).data)


def _first_difference(a: Any, b: Any) -> tuple[Any, Any]:
    """Return the parts of two lists that differ first; anything else as it is."""
    if isinstance(a, list) and isinstance(b, list):
        for x, y in zip(a, b, strict=False):
            if x != y:
                return x, y
        return f"{len(a)} entries", f"{len(b)} entries"
    return a, b
