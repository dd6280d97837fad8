"""Whether replicas are still equal: digests of weights and the optimizer's slots, compared over ranks now and then.

Ranks that start equal and add equal gradients stay equal, to the bit. A fault of memory, or code that changes weights
on one rank alone, ends that without a word: every rank goes on, and none trains the model that it seems to.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from disttrain.autodiff import Tensor
from disttrain.backend import Array, get_array_module
from disttrain.comm import Communicator
from disttrain.data_parallel import FlatBuffer
from disttrain.errors import ConfigError

POLICIES = ("raise", "heal")
_PRIME = (1 << 53) - 111  # the largest below 2^53: what is left fits a float64, which ranks of a node compare fastest
_WORD = np.dtype(np.uint64)


@dataclass(frozen=True, kw_only=True)
class Guard:
    """What is done about replicas that differ.

    Attributes:
        every: after how many steps they are compared again; 0: never.
        policy: ``"raise"``, or ``"heal"``: all take over the state of one of the majority.

    Raises:
        ConfigError: neither of these.
    """

    every: int = 50
    policy: str = "raise"

    def __post_init__(self) -> None:
        if not isinstance(self.every, int) or self.every < 0:
            raise ConfigError(f"check_replicas_every is a number of steps, or 0 for never, not {self.every!r}")
        if self.policy not in POLICIES:
            raise ConfigError(f"on_drift is 'raise' or 'heal', not {self.policy!r}")


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Replicas that differ.

    Attributes:
        tensors: names of the weights that do, and of slots, as in ``dense/kernel/momentum``.
        odd: the ranks that differ from most; empty where there is no majority.
        source: the lowest rank of the majority, else 0.
        world_size: number of ranks.
    """

    tensors: list[str]
    odd: list[int]
    source: int
    world_size: int

    @property
    def words(self) -> str:
        """As in ``rank 2 differs from the other 3 in 'dense/kernel'``."""
        more = f" and {len(self.tensors) - 1} more" if len(self.tensors) > 1 else ""
        what = f"in {self.tensors[0]!r}{more}"
        if self.odd:
            who = f"rank{'s' * (len(self.odd) > 1)} {', '.join(map(str, self.odd))}"
            rest = self.world_size - len(self.odd)
            return f"{who} differ{'s' * (len(self.odd) == 1)} from the other {rest} {what}"
        return f"rank {' and '.join(map(str, range(self.world_size)))} differ {what}, and none is in the majority"


def find(comm: Communicator, buffers: Sequence[FlatBuffer], slots: Sequence[dict[str, Array]] = ()) -> Drift | None:
    """Return how the ranks' weights and slots differ, None where they are equal; every rank calls this.

    Moves 16 bytes for each.

    Args:
        comm: the ranks.
        buffers: where the weights lie.
        slots: for each buffer, arrays laid out as it is, by name; none where ranks have others by design.
    """
    found = {p.name: number for buffer in buffers for p, number in _numbered(buffer, buffer.data)}
    for buffer, arrays in zip(buffers, slots, strict=False):
        for slot, flat in arrays.items():
            found |= {f"{p.name}/{slot}": number for p, number in _numbered(buffer, flat)}
    names, own = list(found), np.array(list(found.values()), np.float64)
    extremes = comm.all_reduce(np.concatenate([own, -own]), "max", name="digests of weights and slots")
    differing = np.flatnonzero(extremes[: own.size] != -extremes[own.size :])
    if not differing.size:
        return None
    replicas = [tuple(row) for row in comm.all_gather(own).tolist()]
    usual, count = Counter(replicas).most_common(1)[0]
    has_majority = 2 * count > comm.world_size
    return Drift(
        tensors=[names[number] for number in differing],
        odd=[rank for rank, replica in enumerate(replicas) if replica != usual] if has_majority else [],
        source=replicas.index(usual) if has_majority else 0,
        world_size=comm.world_size,
    )


def digests(buffer: FlatBuffer, flat: Array) -> list[int]:
    """Return a number below 2^53 for each parameter's part of `flat`, laid out as `buffer`: the sum of its words.

    Any change of a single bit changes it. It is no defence against whoever means to deceive.
    """
    words, size = flat.view(_WORD), _WORD.itemsize // flat.itemsize
    return [_sum(words[place.start // size : -(-place.stop // size)]) for _, place in buffer.places]


def _numbered(buffer: FlatBuffer, flat: Array) -> Iterable[tuple[Tensor, int]]:
    return zip((parameter for parameter, _ in buffer.places), digests(buffer, flat), strict=True)


def _sum(words: Array) -> int:
    total: Any = get_array_module(words).add.reduce(words)  # modulo 2^64
    return int(total) % _PRIME
