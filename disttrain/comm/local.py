"""The transport of a job of one rank: nobody to send to, nothing to do for a collective."""

import json
from typing import Any, NoReturn

from disttrain.backend import Array
from disttrain.comm.arrays import check_writable, combination
from disttrain.comm.base import Communicator
from disttrain.comm.encoded import Wire, wire_of
from disttrain.comm.pending import DONE, HostArray, Pending, Request
from disttrain.errors import CommError


def connect() -> Communicator:
    """Return the communicator of a process that is alone."""
    return LocalCommunicator(rank=0, world_size=1, local_rank=0)


class LocalCommunicator(Communicator):
    """Rank 0 of 1."""

    transport = "local"

    def _isend(self, array: HostArray, dest: int, tag: int) -> Request:
        raise CommError(f"no rank {dest} to send to: this process is alone")

    def _irecv(self, array: HostArray, source: int, tag: int, *, up_to: bool = False) -> Request:
        raise CommError(f"no rank {source} to receive from: this process is alone")

    def start_all_reduce(
        self, array: Array, op: str = "sum", *, wire: str | Wire | None = None, name: str = ""
    ) -> Pending:
        """Return a collective that is done: the sum over one rank is its array."""
        self.all_reduce(array, op)
        wire_of(wire, op, array.dtype)
        return DONE

    def all_gather_json(self, value: Any) -> list[Any]:
        """Return the value as it comes out of JSON: what a step of one rank compares with itself."""
        return [json.loads(json.dumps(value))]

    def split(self, color: int | str | None, key: int = 0) -> "Communicator | None":
        """Return a communicator of this one rank; None for the color None."""
        return None if color is None else LocalCommunicator(rank=0, world_size=1, local_rank=0)

    def _all_reduced(self, array: Array, op: str, what: str, name: str) -> Array:
        check_writable(array)
        combination(op, array)  # refuses what it does not know
        return array

    def abort(self, exit_code: int) -> NoReturn:
        """End this process, as `sys.exit` does."""
        raise SystemExit(exit_code)
