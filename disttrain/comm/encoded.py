"""An all-reduce whose messages are encoded: each rank sums a slice, and what travels is rounded twice, not p times.

Around a ring a sum would be rounded at every rank that it passes. Here slices are exchanged directly: the rank that
owns a slice gets it from all others, decodes and adds, encodes the sum, and sends it to all.
"""

from typing import Protocol

import numpy as np

from disttrain.comm import encodings, ring
from disttrain.comm.encodings import Encoding
from disttrain.comm.pending import Channel, HostArray, Request, Steps
from disttrain.errors import ConfigError


class Wire(Protocol):
    """How a sum of floats over ranks is formed from messages that are shorter than the floats."""

    def all_reduce(self, flat: HostArray, channel: Channel, begin: int = 0) -> Steps:
        """Replace `flat` on every rank by about the sum of all ranks' `flat`: the same bits on all.

        Args:
            flat: shape ``(n,)``, C-contiguous; the same shape and dtype on all ranks.
            channel: of this collective alone.
            begin: where `flat` begins in what is summed, if it is a part of that.
        """


class Encoded:
    """A wire that encodes.

    Args:
        encoding: of the messages.
        memory: of what was summed and not sent, added to the next sum; as long as what is summed. None: it is lost.
    """

    def __init__(self, encoding: Encoding, memory: HostArray | None = None) -> None:
        self.encoding = encoding
        self.memory = memory

    def all_reduce(self, flat: HostArray, channel: Channel, begin: int = 0) -> Steps:
        """Replace `flat` by the sum over all ranks, formed in its dtype, own slice first, then in the order of ranks.

        Moves ``2 (p-1)/p`` of the encoded bytes per rank, in 2 rounds.
        """
        if self.encoding.nbytes(flat.size) >= flat.nbytes:  # nothing to gain: few elements, or of two bytes
            yield from ring.all_reduce(flat, np.add, channel)
            return
        memory = None if self.memory is None else self.memory[begin : begin + flat.size]
        bounds = ring.chunk_bounds(flat.size, channel.world_size)
        yield from reduce_scatter(flat, bounds, self.encoding, channel, memory)
        yield from all_gather(flat, bounds, self.encoding, channel, memory)


def wire_of(wire: "str | Wire | None", op: str, dtype: np.dtype[np.generic]) -> Wire | None:
    """Return the wire that `wire` names, or `wire` itself.

    Raises:
        ConfigError: there is none of that name, or it cannot carry an `op` of `dtype`.
    """
    if wire is None:
        return None
    if op != "sum" or dtype.kind != "f":
        raise ConfigError(f"wire={wire!r} carries sums of floats, not a {op!r} of {dtype}: leave it out")
    return Encoded(encodings.get(wire)) if isinstance(wire, str) else wire


def reduce_scatter(
    flat: HostArray, bounds: list[int], encoding: Encoding, channel: Channel, memory: HostArray | None = None
) -> Steps:
    """Replace chunk `rank` of `flat` by the sum of all ranks' chunk `rank`; the other chunks stay.

    Moves ``(p-1)/p`` of the encoded bytes per rank.

    Args:
        flat: shape ``(n,)``, C-contiguous.
        bounds: ``p + 1`` offsets of the chunks in `flat`, the same on all ranks.
        encoding: of the messages.
        channel: of this collective alone.
        memory: added to `flat`; where it is sent, then, what the encoding lost.
    """
    others = _others(channel)
    own = _chunk(flat, bounds, channel.rank)
    if memory is not None:
        flat += memory
    lent: list[HostArray] = []
    arriving = [(_lend(own, encoding, channel, lent), peer) for peer in others if own.size]
    receives = [channel.receive(encoded, peer) for encoded, peer in arriving]
    sends: list[Request] = []
    for peer in others:
        chunk = _chunk(flat, bounds, peer)
        if chunk.size:
            encoded = _lend(chunk, encoding, channel, lent)
            encoding.encode(chunk, encoded)
            if memory is not None:
                _keep_error(encoding, encoded, chunk, _chunk(memory, bounds, peer))
            sends.append(channel.send(encoded, peer))
    for (encoded, _), receive in sorted(zip(arriving, receives, strict=True), key=lambda each: each[0][1]):
        yield receive
        encoding.add(encoded, own)
    yield from sends
    for encoded in lent:
        channel.scratch.give(encoded)


def all_gather(
    flat: HostArray, bounds: list[int], encoding: Encoding, channel: Channel, memory: HostArray | None = None
) -> Steps:
    """Fill each chunk of `flat` from the rank of its number, as encoded there: also this rank's own.

    Moves ``(p-1)/p`` of the encoded bytes per rank.

    Args:
        flat: shape ``(n,)``, C-contiguous.
        bounds: ``p + 1`` offsets of the chunks in `flat`, the same on all ranks.
        encoding: of the messages.
        channel: of this collective alone.
        memory: gets, for chunk `rank`, what the encoding lost.
    """
    others = _others(channel)
    own = _chunk(flat, bounds, channel.rank)
    lent: list[HostArray] = []
    arriving = []
    for peer in others:
        chunk = _chunk(flat, bounds, peer)
        if chunk.size:
            encoded = _lend(chunk, encoding, channel, lent)
            arriving.append((chunk, encoded, channel.receive(encoded, peer)))
    sends: list[Request] = []
    if own.size and others:
        encoded = _lend(own, encoding, channel, lent)
        encoding.encode(own, encoded)
        sends = [channel.send(encoded, peer) for peer in others]
        if memory is not None:
            _keep_error(encoding, encoded, own, _chunk(memory, bounds, channel.rank))
        encoding.decode(encoded, own)
    for chunk, encoded, receive in arriving:
        yield receive
        encoding.decode(encoded, chunk)
    yield from sends
    for encoded in lent:
        channel.scratch.give(encoded)


def _others(channel: Channel) -> list[int]:
    """Return the other ranks, each rank beginning with the one after it, so that not all send to the same at once."""
    return [(channel.rank + step) % channel.world_size for step in range(1, channel.world_size)]


def _chunk(flat: HostArray, bounds: list[int], number: int) -> HostArray:
    return flat[bounds[number] : bounds[number + 1]]


def _lend(chunk: HostArray, encoding: Encoding, channel: Channel, lent: list[HostArray]) -> HostArray:
    """Return memory for what `chunk` is encoded to, and note it in `lent`."""
    lent.append(channel.scratch.take(encoding.nbytes(chunk.size), np.dtype(np.uint8)))
    return lent[-1]


def _keep_error(encoding: Encoding, encoded: HostArray, values: HostArray, memory: HostArray) -> None:
    encoding.decode(encoded, memory)
    with np.errstate(invalid="ignore"):  # infinity less infinity: the sum itself shows it
        np.subtract(values, memory, out=memory)
