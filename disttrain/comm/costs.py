"""What messages cost, by the model of latency and bandwidth, and which all-reduce costs least by it.

Source of model and formulas: Thakur, Rabenseifner & Gropp, "Optimization of collective communication operations in
MPICH", 2005, section 3: a message of n bytes takes ``alpha + n beta``, and to combine n bytes takes ``n gamma``.
"""

import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from disttrain.comm.pending import Channel, HostArray, Steps

_COMBINE_S = 1e-10  # gamma: a core adds what it has just received at about 10 GB/s

# A round is a message to the next rank and one from the rank before; as many of each size, after one for nothing.
_ROUNDS = 5
_LARGE_BYTES = 1 << 19
_AGE_S = 24 * 3600.0  # after which a figure is measured again


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What messages between ranks cost.

    Attributes:
        latency_s: seconds of a message, however short: alpha.
        byte_s: seconds that each byte adds: beta.
    """

    latency_s: float
    byte_s: float

    def of_ring(self, nbytes: int, ranks: int) -> float:
        """Return the seconds of a ring all-reduce: ``2 (p-1) alpha + (p-1)/p n (2 beta + gamma)``."""
        return 2 * (ranks - 1) * self.latency_s + (ranks - 1) / ranks * nbytes * (2 * self.byte_s + _COMBINE_S)

    def of_doubling(self, nbytes: int, ranks: int) -> float:
        """Return the seconds of one by recursive doubling: ``log2 p (alpha + n (beta + gamma))``.

        Two more messages where `ranks` is no power of two.
        """
        rounds = ranks.bit_length() - 1
        extra = 0 if ranks == 1 << rounds else 2
        return (rounds + extra) * (self.latency_s + nbytes * self.byte_s) + rounds * nbytes * _COMBINE_S


# Within a host, where nothing is measured: messages of MPI, on 2 cores of Zen 4. Those of a ring go through Python one
# by one, those of what is short are prepared: up to 1 MiB two ranks were no faster by the ring.
WITHIN_HOST = Costs(latency_s=5e-5, byte_s=1.5e-10)


def measure(channel: Channel, run: Callable[[Steps, HostArray], None]) -> Costs:
    """Return what messages of this rank to the next one of `channel` cost; all its ranks call this at once.

    Takes 12 messages, of which 6 are of 512 KiB: at 100 Mbit/s 260 ms. Links let short messages pass in bursts.

    Args:
        channel: of this alone.
        run: drives steps, which pass the array, to their end.
    """
    times = []
    for nbytes in (1, _LARGE_BYTES):
        out, into = np.zeros(nbytes, np.uint8), np.empty(nbytes, np.uint8)
        taken = []
        for _ in range(1 + _ROUNDS):
            begin = time.perf_counter()
            run(_round(out, into, channel), out)
            taken.append(time.perf_counter() - begin)
        times.append(statistics.median(taken[1:]))
    short_s, large_s = times
    return Costs(latency_s=short_s, byte_s=max(large_s - short_s, 0.0) / _LARGE_BYTES)


def cached(folder: Path, transport: str, hosts: Sequence[str]) -> Costs | None:
    """Return what `keep` has kept within a day for messages of `transport` between these hosts, in any order."""
    try:
        path = _path(folder, transport, hosts)
        if time.time() - path.stat().st_mtime > _AGE_S:
            return None
        return Costs(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, RecursionError):  # none there, or not one of ours
        return None


def keep(costs: Costs, folder: Path, transport: str, hosts: Sequence[str]) -> None:
    """Keep `costs` for `cached`; a folder that cannot be written to keeps nothing."""
    path = _path(folder, transport, hosts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, written = tempfile.mkstemp(dir=folder)
        with os.fdopen(descriptor, "w") as file:
            json.dump(asdict(costs), file)
        os.replace(written, path)
    except OSError:
        return


def _path(folder: Path, transport: str, hosts: Sequence[str]) -> Path:
    names = json.dumps([transport, sorted(set(hosts))])
    return folder / f"{hashlib.sha256(names.encode()).hexdigest()[:32]}.json"


def _round(out: HostArray, into: HostArray, channel: Channel) -> Steps:
    send = channel.send(out, (channel.rank + 1) % channel.world_size)
    yield channel.receive(into, (channel.rank - 1) % channel.world_size)
    yield send
