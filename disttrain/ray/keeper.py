"""The last step, where rank 0 is on another node than the supervisor: an actor there writes and reads it for rank 0."""

from collections.abc import Iterable
from typing import Any

from disttrain.last_step import Bytes, LastStep, Store


class Keeper:
    """Keeps states in the supervisor's memory, on the supervisor's host.

    Args:
        address: of that memory.
    """

    def __init__(self, address: str) -> None:
        self._last = LastStep.at(address)

    def write(self, step: int, data: bytes) -> None:
        """Keep a state."""
        self._last.write(step, [data])

    def read(self) -> tuple[int, bytes] | None:
        """Return the newest state; as `LastStep.read`."""
        return self._last.read()


def address(name: str) -> str:
    """Return by what ranks of the job open the `Keeper` that is an actor of this name."""
    return f"{__name__}//{name}"


def opened(name: str) -> Store:
    """Return what reaches the `Keeper` of a name.

    Raises:
        OSError: there is none.
    """
    import ray

    try:
        return _Reached(ray.get_actor(name))
    except ValueError as error:
        raise OSError(str(error)) from error


class _Reached:
    """A `Keeper` on another node; a state travels by Ray, and has arrived when `write` returns."""

    def __init__(self, keeper: Any) -> None:
        self._keeper = keeper

    def write(self, step: int, chunks: Iterable[Bytes]) -> None:
        self._answer(self._keeper.write, step, b"".join(chunks))

    def read(self) -> tuple[int, bytes] | None:
        found: tuple[int, bytes] | None = self._answer(self._keeper.read)
        return found

    def close(self) -> None:
        self._keeper = None

    def _answer(self, method: Any, *args: Any) -> Any:
        import ray

        try:
            return ray.get(method.remote(*args))
        except ray.exceptions.RayError as error:
            raise OSError(f"the actor on the supervisor's host has not done it: {error}") from error
