"""Compression: how the gradients of a bucket are summed by fewer bytes than they have."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from disttrain.comm.base import Wire
from disttrain.comm.pending import HostArray


@dataclass(frozen=True, kw_only=True)
class Part:
    """Where a parameter's gradient lies in a bucket.

    Attributes:
        name: of the parameter.
        place: in the bucket.
        shape: of the parameter.
    """

    name: str
    place: slice
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Carrier:
    """A wire made for one bucket, with what it keeps from one sum to the next.

    Attributes:
        wire: forms the sums.
        memory: what this rank was to sum and has not sent yet, as long as the bucket; None where such is lost.
        guesses: arrays by name that make the next sum better, whatever they hold, if they are the same on all ranks.
    """

    wire: Wire
    memory: HostArray | None = None
    guesses: dict[str, HostArray] = field(default_factory=dict)


class Compression(ABC):
    """Base of all: a frozen dataclass with the settings, and one method."""

    @abstractmethod
    def carrier(self, parts: Sequence[Part], size: int, dtype: Any) -> Carrier:
        """Return what carries the sums of a bucket.

        Args:
            parts: the parameters in it, in the order of their places; what lies between them is 0.
            size: number of elements.
            dtype: of floats.
        """

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this compression again."""
        return {each.name: getattr(self, each.name) for each in fields(self)}  # type: ignore[arg-type]
