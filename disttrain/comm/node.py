"""The ranks of one node: windows of memory that all of them see, and sums that are formed in place there."""

import ctypes
import itertools
import os
import time
import weakref
import zlib
from collections.abc import Callable, Iterable, Sequence
from mmap import mmap
from typing import Any, Literal

import numpy as np

from disttrain import progress
from disttrain.backend import Array
from disttrain.comm.arrays import aligned_zeros
from disttrain.comm.contract import Call
from disttrain.comm.pending import Channel, HostArray
from disttrain.comm.segments import Exchange, SegmentsError, share
from disttrain.comm.waiting import Patience, left_alone
from disttrain.errors import CommError
from disttrain.kernels import all_reduce
from disttrain.observe import log

_OPS = ("sum", "max", "min", "first")
# First those of COMPUTED.
_DTYPES = tuple(np.dtype(char) for char in "fdebBhHiIlLqQ?FD")
_KINDS = {op: {dtype: len(_OPS) * d + o for d, dtype in enumerate(_DTYPES)} for o, op in enumerate(_OPS)}
_SPREADING = _KINDS.pop("first")  # what ranks ask for by `spread` only
COMPUTED = frozenset(_DTYPES[:2])  # what is summed in the node; of all else ranks compare that it is the same
_OTHER = 63  # any other dtype
_COUNT_BITS, _KIND_BITS = 36, 6  # of an announcement; the others are for `_digest`
_pointer_to = (ctypes.c_char * 0).from_buffer

# After so long a rank that waits looks after signals, and messages of its own that others may wait for.
_TURN_NS = 1_000_000
# Looks before the core is offered to others: about 50 us, where each rank has a core to wait on.
_SPINS, _SPINS_ON_SHARED_CORES = 2000, 50


def join(members: Sequence[int], rank: int, exchange: Exchange, serve: Callable[[int], bool]) -> "Node | None":
    """Return the node of those ranks that call this; None on all of them where memory cannot be shared.

    Args:
        members: the ranks of the node, as the job numbers them.
        rank: of this process, as the job numbers it.
        exchange: returns the JSON values that all ranks of the node have passed to it, in the order of their ranks.
        serve: called now and then while this rank waits, with the rank that it waits for; moves messages on, and
            returns whether that rank has ended.
    """
    slots_bytes = all_reduce.slots_bytes()
    facts = exchange([slots_bytes, sorted(os.sched_getaffinity(0))])
    if slots_bytes is None or any(size != slots_bytes for size, _ in facts):
        return None  # the kernels have said so
    try:
        slots = share(slots_bytes, exchange, members)
    except SegmentsError as error:
        if rank == members[0]:
            log.warning("ranks communicate by messages, slower than in shared memory: %s", error)
        return None
    cores = set[int]().union(*(cores for _, cores in facts))
    return Node(members, rank, slots, len(cores) < len(slots), exchange, serve)


class Node:
    """The ranks of a node, as one of them sees them; made by `join`.

    Args:
        members: as of `join`.
        rank: as of `join`.
        slots: memory of each rank, in which it announces its arrays.
        is_crowded: whether there are more ranks than cores.
        exchange: as of `join`.
        serve: as of `join`.
    """

    def __init__(
        self,
        members: Sequence[int],
        rank: int,
        slots: list[mmap],
        is_crowded: bool,
        exchange: Exchange,
        serve: Callable[[int], bool],
    ) -> None:
        self.serve = serve
        self.members = members
        self.rank = rank
        self._place = members.index(rank)
        self._slots = slots
        self._exchange = exchange
        self._windows: list[list[mmap] | None] = []
        self._dropped: set[int] = set()  # windows whose array this rank has no more
        self._has_warned = False
        self._start, self._continue = all_reduce.functions()
        self.ranks = all_reduce.Ranks(
            rank=self._place,
            size=len(slots),
            spins=_SPINS_ON_SHARED_CORES if is_crowded else _SPINS,
            slots=_numbers(map(_address, slots)),
            arrays=_numbers([0] * len(slots)),
        )
        self._prepare()

    def allocate(self, size: int, dtype: np.dtype[Any]) -> HostArray:
        """Return zeros that lie in a window, shape ``(size,)``; every rank calls this.

        Raises:
            CommError: ranks ask for different sizes.
        """
        nbytes = size * dtype.itemsize
        asked = self._exchange([nbytes, sorted(self._dropped)])
        for rank, (other, _) in zip(self.members, asked, strict=True):
            if other != asked[0][0]:
                raise CommError(
                    f"ranks allocate different sizes: rank {self.members[0]} {asked[0][0]} bytes, rank {rank} {other}; "
                    "every rank must allocate the same arrays in the same order"
                )
        # Only now: a rank that has dropped its array cannot know how long others still use theirs.
        for window in set[int].intersection(*(set(dropped) for _, dropped in asked)):
            self._put(window, None)
            self._dropped.discard(window)
        if not nbytes:
            return aligned_zeros(size, dtype)
        try:
            segments = share(nbytes, self._exchange, self.members)
        except SegmentsError as error:
            if self._place == 0 and not self._has_warned:
                log.warning("sums over ranks are formed by messages, slower than in shared memory: %s", error)
            self._has_warned = True
            return aligned_zeros(size, dtype)
        window = self._windows.index(None) if None in self._windows else len(self._windows)
        self._put(window, segments)
        array: HostArray = np.frombuffer(segments[self._place], dtype, size)
        weakref.finalize(array, self._dropped.add, window).atexit = False
        return array

    def all_reduce(self, flat: HostArray, op: str, shape: Sequence[int], name: str) -> "Share":
        """Start to combine `flat`, shape ``(n,)``, contiguous, over the ranks.

        Args:
            flat: the array.
            op: as of `Communicator.all_reduce`.
            shape: of what `flat` is a view of; the same on all ranks, as `name` is.
            name: what it is.
        """
        what = flat.size << _KIND_BITS | _KINDS[op].get(flat.dtype, _OTHER)
        if name or len(shape) > 1:
            what |= _digest(name, shape)
        self._collective.limit_ns = 0
        status = self._start(self._address, flat.ctypes.data, what)
        return self._share(status)

    def all_reduce_at_once(
        self, array: Array, op: str, name: str, limit_ns: int = _TURN_NS
    ) -> "Literal[True] | Share | None":
        """Combine `array` over the ranks if they are there, or come soon: True when that is done, by one call.

        Returns:
            None, with nothing started, where the array must be prepared first; else, if not True, what is left.
        """
        try:
            what = array.size << _KIND_BITS | _KINDS[op][array.dtype]
            # one look at all that matters: in host memory, contiguous, and writable
            data = _pointer_to(array)
        except (KeyError, TypeError, ValueError, AttributeError):
            return None
        if name or array.ndim > 1:
            what |= _digest(name, array.shape)
        self._collective.limit_ns = limit_ns
        status = self._start(self._address, data, what)
        return True if status == all_reduce.DONE else self._share(status)

    def passes_by(self, call: Call) -> None:
        """Note a collective that goes by messages alone: the next one here compares what led to it."""
        self.ranks.others = zlib.crc32(call.mark.to_bytes(8, "little", signed=True), self.ranks.others)

    def reserve(self) -> int:
        """Return a place among the collectives of this node, for `spread`: all ranks do so in the same order."""
        self.ranks.next += 1
        return int(self.ranks.next)

    def spread(self, flat: HostArray, number: int) -> "Share":
        """Start to replace `flat` by that of the node's first rank.

        Args:
            flat: as of `all_reduce`, of a dtype that is COMPUTED.
            number: what `reserve` has returned; the collectives in between may be done or not.
        """
        self._collective.number, self._collective.count = number, flat.size
        self._collective.kind, self._collective.data = _SPREADING[flat.dtype], flat.ctypes.data
        self._collective.what = flat.size << _KIND_BITS | _SPREADING[flat.dtype]
        return self._share(all_reduce.WAITS)

    def _share(self, status: int) -> "Share":
        """Return what is left of the collective that was started last."""
        share = Share(self, self._collective, status, self._continue)
        self._prepare()
        return share

    def _prepare(self) -> None:
        """Make what the next collective that is not done at once is kept in."""
        self._collective = all_reduce.Collective(ranks=ctypes.pointer(self.ranks))
        self._address = ctypes.addressof(self._collective)

    def _put(self, window: int, segments: list[mmap] | None) -> None:
        """Make `segments` a window, or give it up: None."""
        self._windows[window : window + 1] = [segments]
        nothing = [0] * len(self._slots)
        addresses = [[_address(each) for each in held] if held else nothing for held in self._windows]
        self.ranks.segments = _numbers(itertools.chain.from_iterable(addresses))
        self.ranks.lengths = _numbers(len(held[0]) if held else 0 for held in self._windows)
        self.ranks.windows = len(self._windows)


class Share:
    """A rank's share in an all-reduce under way: a `Request`, done when this rank has nothing left to do in it.

    Attributes:
        is_elsewhere: once done, whether the arrays are as they were, being of a dtype that is not COMPUTED.
        channel: of the collective that it is part of; to be set before it is tested or waited for.
    """

    channel: Channel

    def __init__(self, node: Node, state: all_reduce.Collective, status: int, go_on: Any) -> None:
        self.is_elsewhere = False
        self._node = node
        self._state = state
        self._address = ctypes.addressof(state)
        self._status = status
        self._continue = go_on

    def test(self) -> bool:
        """Return whether it is done, after moving it on as far as goes without waiting."""
        return self._go_on(0)

    def wait(self) -> None:
        """Block until it is done."""
        patience: Patience | None = None
        while not self._go_on(_TURN_NS):
            rank, now_s = self._node.members[self._state.ready], time.monotonic()
            if patience is None or patience.peer != rank:
                progress.waits_for(rank)
                patience = Patience(self._node.rank, rank, now_s)
            patience.check(now_s)
            self.channel.waits_for(rank)
            # The second look: that rank may have done its part just before it ended.
            if self._node.serve(rank) and not self._go_on(0):
                raise left_alone(self._node.rank, rank)

    def _go_on(self, limit_ns: int) -> bool:
        if self._status == all_reduce.WAITS:
            self._status = self._continue(self._address, limit_ns)
        if self._status == all_reduce.DIFFERS:
            assert self.channel.call is not None
            self.channel.differs(self._announced(self.channel.call.sequence))
        self.is_elsewhere = self._status == all_reduce.ELSEWHERE
        return self._status != all_reduce.WAITS

    def _announced(self, sequence: int) -> list[tuple[int, Call]]:
        """Return what the slots say, where ranks differ: the ranks, and their calls without file and line."""
        calls = []
        for place, rank in enumerate(self._node.members):
            what = all_reduce.announced(self._state, place)
            number, op = divmod(what & (1 << _KIND_BITS) - 1, len(_OPS))
            dtype = str(_DTYPES[number]) if number < len(_DTYPES) else "of another dtype"
            count = what >> _KIND_BITS & (1 << _COUNT_BITS) - 1
            calls.append((rank, Call(sequence, f"all_reduce {_OPS[op]}", dtype, (count,), "", 0, "")))
        return calls


def _digest(name: str, shape: Sequence[int]) -> int:
    """Return what must be equal on all ranks and is not compared otherwise, in the upper bits of an announcement."""
    bits = 63 - _KIND_BITS - _COUNT_BITS
    return (zlib.crc32(f"{name} {shape}".encode()) & (1 << bits) - 1) << _KIND_BITS + _COUNT_BITS


def _numbers(values: Iterable[int]) -> Any:
    """Return numbers as a pointer that keeps them."""
    numbers = list(values)
    return ctypes.cast((ctypes.c_int64 * len(numbers))(*numbers), ctypes.POINTER(ctypes.c_int64))


def _address(memory: mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
