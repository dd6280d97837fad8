"""Broadcast and barrier in as few rounds as the logarithm of the number of ranks."""

import numpy as np

from disttrain.comm.pending import Channel, HostArray, Steps


def broadcast(flat: HostArray, root: int, channel: Channel) -> Steps:
    """Replace `flat` on every rank by that of `root`, along a binomial tree.

    ``ceil(log2 p)`` rounds; the root sends the whole array in each of them.

    Args:
        flat: shape ``(n,)``, C-contiguous; the same shape and dtype on all ranks.
        root: the rank that has the data.
        channel: of this collective alone.

    Source: Thakur, Rabenseifner & Gropp, "Optimization of collective communication operations in
    MPICH", 2005.
    """
    world_size = channel.world_size
    place = (channel.rank - root) % world_size  # the root has place 0, its children 1, 2, 4, ...
    distance = 1
    while distance < world_size and not place & distance:
        distance *= 2
    if place:
        yield channel.receive(flat, (place - distance + root) % world_size)
    sends = []
    while distance > 1:
        distance //= 2
        if place + distance < world_size:
            sends.append(channel.send(flat, (place + distance + root) % world_size))
    yield from sends


def barrier(channel: Channel) -> Steps:
    """End on no rank before it has begun on every rank. ``ceil(log2 p)`` rounds of empty messages.

    Source: Hensgen, Finkel & Manber, "Two algorithms for barrier synchronization", 1988.
    """
    nothing = np.empty(0, np.uint8)
    distance = 1
    while distance < channel.world_size:
        send = channel.send(nothing, (channel.rank + distance) % channel.world_size)
        yield channel.receive(nothing, (channel.rank - distance) % channel.world_size)
        yield send
        distance *= 2
