"""Which checkpoints stay when another is written."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from disttrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Metric:
    """The value by which checkpoints are compared.

    Attributes:
        name: of the value.
        value: of this checkpoint.
        mode: ``"min"`` or ``"max"``: which is better.
    """

    name: str
    value: float
    mode: str

    @property
    def rank(self) -> float:
        """What sorts the best first; NaN is the worst."""
        if math.isnan(self.value):
            return math.inf
        return -self.value if self.mode == "max" else self.value


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Which checkpoints stay: the newest, the best, and some for good.

    Attributes:
        last: how many of the newest; two, so that a damaged one leaves one.
        best: how many of the best, by the value that the callback monitors.
        every: each whose number is a multiple of this; 0: none.
    """

    last: int = 2
    best: int = 0
    every: int = 0

    def __post_init__(self) -> None:
        for name, value, least in (("last", self.last, 1), ("best", self.best, 0), ("every", self.every, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"keep: {name} must be an integer of at least {least}, not {value!r}")

    def removable(self, numbers: Sequence[int], metrics: Mapping[int, Metric]) -> list[int]:
        """Return which of the checkpoints `numbers`, ascending, may go; `metrics` are of those that have one."""
        best = sorted((number for number in numbers if number in metrics), key=lambda n: (metrics[n].rank, n))
        kept = {*numbers[-self.last :], *best[: self.best]}
        return [n for n in numbers if n not in kept and not (self.every and n % self.every == 0)]
