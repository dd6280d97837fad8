"""A communicator: a transport supplies send and receive, all else is written once on top."""

import contextvars
import itertools
import json
import os
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NoReturn

import numpy as np

from disttrain import env, progress
from disttrain.backend import Array, get_array_module
from disttrain.comm import canonical, costs, doubling, node, ring, tree
from disttrain.comm.arrays import aligned_zeros, check_flat, check_writable, combination, contiguous, copy_back
from disttrain.comm.contract import TAG, Call, Contract, called
from disttrain.comm.costs import Costs
from disttrain.comm.encoded import Wire, wire_of
from disttrain.comm.heads import PlainRepeated
from disttrain.comm.node import Node, Share
from disttrain.comm.pending import DONE, Channel, HostArray, Pending, Repeated, Request, Steps
from disttrain.comm.scratch import Scratch
from disttrain.comm.segments import Exchange
from disttrain.comm.shorts import Shorts
from disttrain.errors import CommError, ConfigError, ShapeError

__all__ = ["Communicator", "Pending", "Request", "Wire"]

# Every MPI has tags up to 32767: the lower half is the user's, the upper one that of collectives.
USER_TAGS = TAG
_TAGS = USER_TAGS - 2  # of collectives: behind that of the contract, before
_NODE_TAG = 2 * USER_TAGS - 1  # of what the ranks of a node tell each other, however often those of others do
GROUP_TAGS = 1 << 32  # of a group's own, where groups have theirs in the transport's: more than it uses
_NOTHING = np.empty(0, np.float32)


class Communicator(ABC):
    """The ranks of a job, and this process's rank among them.

    Every rank calls the same collectives in the same order, with arrays of the same shape and
    dtype. Arrays on a device or not contiguous in memory pass through a copy in host memory.

    Attributes:
        rank: from 0 to ``world_size - 1``.
        world_size: number of ranks.
        local_rank: rank among those on this host.
        job_ranks: of each rank of this communicator, the rank in the job: in a group, `split`, another one.
        transport: the name under which `connect` found the transport.
        bytes_sent: payload of all messages that this rank has sent so far; what ranks of a node read from each other's
            memory is none.
        scratch: lends memory to collectives.
        quietly: calls a function with arguments; floating-point errors in it are no warnings.
        hosts: of each rank, what tells its host from others; empty until ranks have told each other.
        costs: of messages between hosts, or, where all ranks are on one, within it; the same on all ranks.
    """

    transport = ""

    def __init__(self, *, rank: int, world_size: int, local_rank: int) -> None:
        if not 0 <= rank < world_size:
            raise CommError(f"rank {rank} of world_size {world_size}: expected a rank from 0 to world_size - 1")
        self.rank = rank
        self.world_size = world_size
        self.local_rank = local_rank
        self.bytes_sent = 0
        self._sequence = 0
        self._under_way: deque[Pending] = deque()
        self.scratch = Scratch()
        self._node: Node | None = None
        self._nodes = [[each] for each in range(world_size)]  # the ranks of each: they share memory
        self._host = ""  # as `join_node` was told
        self.hosts: Sequence[str] = ()
        self.costs = costs.WITHIN_HOST
        self.job_ranks: Sequence[int] = range(world_size)
        self._job = self
        self._group = 0  # its number; 0 for the ranks of the whole job
        self._note = ""  # to errors: which group it was
        self._groups = 0  # in the job's communicator: the highest number of a group that this rank has been in
        self._everywhere: deque[Pending] = deque()  # as `_under_way`, of the job and all groups in it
        self._contract = Contract(self)
        self._shorts = Shorts()
        # An overflow shows in a sum, on all ranks; a warning would be raised on one. Set once: it takes a microsecond.
        with np.errstate(over="ignore", invalid="ignore"):
            self.quietly = contextvars.copy_context().run

    @abstractmethod
    def _isend(self, array: HostArray, dest: int, tag: int) -> Request:
        """Start to send `array`, C-contiguous, shape ``(n,)``, which stays as it is until sent."""

    @abstractmethod
    def _irecv(self, array: HostArray, source: int, tag: int, *, up_to: bool = False) -> Request:
        """Start to receive into `array`; messages of one source and tag arrive in their order.

        Args:
            array: C-contiguous, shape ``(n,)``.
            source: who sends.
            tag: of the message.
            up_to: whether it may be shorter than `array`; else that is an error.
        """

    def _repeated(self, memory: HostArray, peer: int, tag: int, *, sends: bool) -> Repeated:
        """Return a message that is sent, or received, again and again; a transport may have it prepared.

        Args:
            memory: shape ``(n,)``, of uint8.
            peer: the other rank.
            tag: of the message.
            sends: whether it is sent, or received; what comes may be shorter than `memory`.
        """
        return PlainRepeated(weakref.proxy(self), memory, peer, tag, sends=sends)  # this has it

    def _tell(self, rank: int, data: bytes) -> None:  # noqa: B027
        """Start to send a control message of at most 4 KiB to `rank`, past all messages; never blocks.

        Without this, ranks that only wait for one that has found a difference do not hear of it.
        """

    def _told(self) -> tuple[int, bytes] | None:
        """Return the rank and the data of a control message that has come, None where there is none; never blocks."""
        return None

    @abstractmethod
    def abort(self, exit_code: int) -> NoReturn:
        """End all ranks at once."""

    def shrink(self) -> list[int]:
        """Become the communicator of those ranks that are alive, all of which call this.

        They are numbered anew, in their order; what was under way is given up, and groups made by `split` are of no
        use any more.

        Returns:
            The ranks lost, by the numbers that the launcher has given them.

        Raises:
            CommError: this transport loses no rank alone.
        """
        raise CommError(f"the transport {self.transport or type(self).__name__} cannot go on without a rank")

    def split(self, color: int | str | None, key: int = 0) -> "Communicator | None":
        """Return a communicator of the ranks that pass the same `color`; every rank calls this, as a collective.

        Its collectives and messages meet those of no other communicator, and may be under way at the same time. Errors
        and warnings name ranks by their numbers in the job. What it holds is free again when it is dropped.

        Args:
            color: which group this rank is in; None: in none.
            key: ranks are numbered in the order of their keys; where these are equal, as they are here.

        Returns:
            The communicator of this rank's group; None for the color None.

        Source: MPI_Comm_split.
        """
        if not isinstance(color, int | str | None) or not isinstance(key, int):
            raise ConfigError(f"split({color!r}, {key!r}): expected a number, a string or None, and a number as key")
        asked = self.all_gather_json([color, key, self._job._groups])
        members = [rank for rank, (its, *_) in enumerate(asked) if its == color and color is not None]
        members.sort(key=lambda rank: (asked[rank][1], rank))
        # Groups of other ranks may have the same number, but no rank is in two groups of the same.
        number = 1 + max((asked[rank][2] for rank in members), default=0)
        group = self._split(members, number)
        if group is None:
            return None
        self._job._groups = group._group = number
        group._job, group._everywhere = self._job, self._everywhere
        group.job_ranks = [self.job_ranks[rank] for rank in members]
        group._note = f"in group {number}, of the job's ranks {', '.join(map(str, group.job_ranks))}"
        self._job._contract.groups[group._contract.key] = group._contract
        group.transport, group.costs = self.transport, self._job.costs
        group.local_rank = group.rank
        if self._job._host:
            group.join_node(self._job._host)
        return group

    def _split(self, members: Sequence[int], number: int) -> "Communicator | None":
        """Return a communicator of `members`, None if they are none; every rank calls this, with those of its group."""
        from disttrain.comm.group import GroupCommunicator  # which needs this module

        return GroupCommunicator(self._job, [self.job_ranks[rank] for rank in members], number) if members else None

    def join_node(self, host: str) -> None:
        """Share memory with the other ranks of this host; every rank calls this, once.

        Args:
            host: tells the host of this rank from those of others.
        """
        self._host = host
        if self.world_size == 1:
            return
        hosts = self.hosts = self.all_gather_json(host)
        members = [rank for rank, other in enumerate(hosts) if other == host]
        self.local_rank = members.index(self.rank)
        self._node = None
        if len(members) > 1:
            names = [self.job_ranks[rank] for rank in members]
            exchange = self._exchange_among(members)
            self._node = node.join(names, self.job_ranks[self.rank], exchange, self._job._serve)
        shared = self.all_gather_json(members if self._node else [self.rank])
        self._nodes = [ranks for rank, ranks in enumerate(shared) if ranks[0] == rank]
        if len(set(self.hosts)) > 1 and self._job is self:
            self.costs = self._measured()

    def all_reduce_s(self, nbytes: int) -> float:
        """Return the seconds that an all-reduce of so many bytes takes between nodes, by `costs`."""
        known, nodes = self.costs, len(self._nodes)
        return min(known.of_ring(nbytes, nodes), known.of_doubling(nbytes, nodes))

    def _measured(self) -> Costs:
        """Return the costs of messages between hosts: measured, unless a job of these hosts did so within a day."""
        found = costs.cached(env.costs_dir(), self.transport, self.hosts) if self.rank == 0 else None
        found_there = self.broadcast_json(found and asdict(found))
        if found_there:
            return Costs(**found_there)
        channel, own = self._channel("measure of messages", _NOTHING), None
        if self.rank in self._leaders:

            def run(steps: Steps, array: HostArray) -> None:
                self._run(steps, "all_gather", array)

            own = asdict(costs.measure(channel.among(self._leaders), run))
        everyone = [each for each in self.all_gather_json(own) if each]
        slowest = Costs(**{name: max(each[name] for each in everyone) for name in everyone[0]})
        if self.rank == 0:
            costs.keep(slowest, env.costs_dir(), self.transport, self.hosts)
        return slowest

    def _serve(self, rank: int) -> bool:
        """Move messages on, while this rank waits in the node's memory for `rank`; return whether that has ended."""
        return False

    def isend(self, array: Array, dest: int, tag: int = 0) -> Request:
        """Start to send `array` to rank `dest`; it must not change until the request is done.

        Args:
            array: any shape.
            dest: another rank.
            tag: from 0 to 16383; tells messages of one source apart.
        """
        self._check_peer("dest", dest, tag)
        flat = contiguous(array).reshape(-1)
        self.bytes_sent += flat.nbytes
        return self._isend(flat, dest, tag)

    def irecv(self, array: Array, source: int, tag: int = 0) -> Request:
        """Start to receive `array` from rank `source`: complete when the request is done.

        Raises:
            ShapeError: `array` is not a C-contiguous NumPy array that can be written to.
        """
        self._check_peer("source", source, tag)
        if not isinstance(array, np.ndarray) or not array.flags.c_contiguous:
            raise ShapeError("expected a C-contiguous NumPy array to receive into")
        check_writable(array)
        return self._irecv(contiguous(array).reshape(-1), source, tag)

    def send(self, array: Array, dest: int, tag: int = 0) -> None:
        """Send `array` to rank `dest`; block until it may be changed again."""
        host = contiguous(array)
        self._finish(self.isend(host, dest, tag), "send", host, dest)

    def recv(self, array: Array, source: int, tag: int = 0) -> Array:
        """Receive `array` from rank `source`, in place, and return it."""
        self._finish(self.irecv(array, source, tag), "recv", array, source)
        return array

    def allocate(self, size: int, dtype: Any = np.float32) -> HostArray:
        """Return zeros in the host memory in which this communicator sums fastest, shape ``(size,)``.

        They begin at a multiple of 64 bytes. All ranks call this, as they would a collective. Where the ranks are
        on one node it is memory that all of them see; it is free again at the next call after all have dropped it.

        Raises:
            CommError: ranks ask for different sizes.
        """
        return (self._node.allocate if self._node else aligned_zeros)(size, np.dtype(dtype))

    def all_reduce(self, array: Array, op: str = "sum", *, name: str = "") -> Array:
        """Replace `array` by the sum over all ranks, in place, and return it: the same bits on all.

        Long arrays move ``2 (p-1)/p`` of their bytes per rank, or, between hosts, per host; short ones move in fewer
        messages, by `costs`.

        Args:
            array: any shape; the sum is formed in its dtype.
            op: ``"sum"``, ``"max"`` or ``"min"``.
            name: what it is, in words, for errors: ranks whose names differ are told so.

        Raises:
            ContractError: on all ranks, where they make different calls; so does every collective.
        """
        return self._all_reduced(array, op, "all_reduce", name)

    def start_all_reduce(
        self, array: Array, op: str = "sum", *, wire: str | Wire | None = None, name: str = ""
    ) -> Pending:
        """Start to replace `array` by the sum over all ranks; leave it alone until that is done.

        Nothing moves by itself: call `Pending.advance` now and then, and `Pending.wait` at the end.

        Args:
            array: any shape.
            op: ``"sum"``, ``"max"`` or ``"min"``.
            wire: how a sum of floats travels: ``"float16"``, ``"bfloat16"``, ``"int8"``, or a wire of your own; None:
                as it is. What ranks sum in memory that they share does not travel, and is not rounded.
            name: as of `all_reduce`.
        """
        begun: Share | None = None
        if wire is None and self._node is not None and self._is_one_node:
            made = self._node.all_reduce_at_once(array, op, name, limit_ns=0)
            if isinstance(made, bool):
                self._sequence += 1  # as in `_all_reduced`
                return DONE
            begun = made
        if begun is None:
            check_writable(array)
            combination(op, array)  # refuses what it does not know
        carrier = wire_of(wire, op, array.dtype)
        way = "" if wire is None else f" by {wire if isinstance(wire, str) else type(wire).__name__}"
        channel = self._channel(f"all_reduce {op}{way}", array, name, by_messages=False)
        return self._start(self._all_reduce(array, op, channel, name, begun, carrier), "all_reduce", array)

    def start_shard_sum(self, nodes: Sequence[Array], out: Array, layout: canonical.Layout) -> Pending:
        """Start to put the sum over the shards of a batch into `out`: the same bits for any number of ranks.

        Args:
            nodes: the sums of this rank's subtrees, in the order of `layout`; overwritten.
            out: of their shape and dtype; may be the first of them.
            layout: of the shards.
        """
        if layout.is_plain:
            if out is not nodes[0]:
                out[...] = nodes[0]
            return self.start_all_reduce(out)
        return self._start(self._shard_sum(nodes, out, layout, self._channel("shard_sum", out)), "shard_sum", out)

    def start_reduce_scatter(self, flat: HostArray) -> Pending:
        """Start to replace the chunk of this rank's number in `flat` by the sum over all ranks' chunks of that number.

        The same bits as of `start_all_reduce`; the other chunks are left with anything. Driven as that is. Moves
        ``(p-1)/p`` of the bytes per rank.

        Args:
            flat: shape ``(n,)``, C-contiguous, of NumPy; chunk r of p begins at ``n*r // p``.
        """
        check_flat(flat)
        channel = self._channel("reduce_scatter sum", flat, by_messages=len(self._nodes) == self.world_size)
        return self._start(self._reduce_scatter(flat, channel), "reduce_scatter", flat)

    def start_all_gather(self, flat: HostArray) -> Pending:
        """Start to fill each chunk of `flat` from the rank of its number; driven as `start_all_reduce` is.

        Args:
            flat: as of `start_reduce_scatter`, which leaves the chunk that this rank sends.
        """
        check_flat(flat)
        bounds = ring.chunk_bounds(flat.size, self.world_size)
        return self._start(ring.all_gather(flat, bounds, self._channel("all_gather", flat)), "all_gather", flat)

    def reduce_scatter(self, array: Array, op: str = "sum") -> Array:
        """Return this rank's rows of the sum over all ranks; `array` itself is not changed.

        Args:
            array: shape ``(n, ...)``; rank r of p gets rows ``n*r // p`` up to ``n*(r+1) // p``.
            op: ``"sum"``, ``"max"`` or ``"min"``.
        """
        combine, host = combination(op, array), contiguous(array)
        if host.ndim == 0:
            raise ShapeError("reduce_scatter divides axis 0, and an array of shape () has none")
        rows = ring.chunk_bounds(len(host), self.world_size)
        row_size = host.size // max(len(host), 1)
        bounds = [row * row_size for row in rows]
        flat = self.scratch.take(host.size, host.dtype)
        np.copyto(flat, host.reshape(-1))
        channel = self._channel(f"reduce_scatter {op}", host)
        self._run(ring.reduce_scatter(flat, bounds, combine, channel), "reduce_scatter", host)
        mine = flat[bounds[self.rank] : bounds[self.rank + 1]].copy()
        self.scratch.give(flat)
        shape = (rows[self.rank + 1] - rows[self.rank], *host.shape[1:])
        return get_array_module(array).asarray(mine.reshape(shape))

    def all_gather(self, array: Array) -> Array:
        """Return the arrays of all ranks, shape ``(world_size, *array.shape)``."""
        host = contiguous(array)
        gathered = np.empty((self.world_size, *host.shape), host.dtype)
        gathered[self.rank] = host
        bounds = [rank * host.size for rank in range(self.world_size + 1)]
        channel = self._channel("all_gather", host)
        self._run(ring.all_gather(gathered.reshape(-1), bounds, channel), "all_gather", gathered)
        return get_array_module(array).asarray(gathered)

    def broadcast(self, array: Array, root: int = 0) -> Array:
        """Replace `array` by that of rank `root`, in place, and return it."""
        self._check_rank("root", root)
        check_writable(array)
        host = contiguous(array)
        channel = self._channel(f"broadcast from rank {root}", host)
        self._run(tree.broadcast(host.reshape(-1), root, channel), "broadcast", host)
        copy_back(host, array)
        return array

    def barrier(self) -> None:
        """Block until every rank has called this."""
        if self._is_one_node:
            self._all_reduced(_NOTHING, "sum", "barrier", "barrier")
        else:
            channel = self._channel("barrier", _NOTHING)
            self._run(tree.barrier(channel), "barrier", _NOTHING)

    def all_gather_json(self, value: Any) -> list[Any]:
        """Return the values of all ranks, as they come out of JSON: tuples as lists."""
        return self._exchanged(value, self._channel("all_gather_json", _NOTHING))

    def broadcast_json(self, value: Any, root: int = 0) -> Any:
        """Return the value of rank `root`, as it comes out of JSON; others are ignored."""
        data = np.frombuffer(json.dumps(value if self.rank == root else None).encode(), np.uint8)
        size = self.broadcast(np.array(data.size), root)
        flat = data.copy() if self.rank == root else np.empty(int(size), np.uint8)
        return json.loads(self.broadcast(flat, root).tobytes())

    def _exchange_among(self, ranks: Sequence[int]) -> Exchange:
        """Return what exchanges JSON values among `ranks`, this one among them, in the order of `ranks`."""

        def exchange(value: Any) -> list[Any]:
            return self._exchanged(value, Channel(self, _NODE_TAG, None).among(ranks))

        return exchange

    def _exchanged(self, value: Any, channel: Channel) -> list[Any]:
        """Return the values of all ranks of `channel`, as they come out of JSON."""
        data = np.frombuffer(json.dumps(value).encode(), np.uint8)
        sizes = np.zeros(channel.world_size, np.int64)
        sizes[channel.rank] = data.size
        self._run(ring.all_gather(sizes, range(sizes.size + 1), channel), "all_gather", sizes)
        bounds = [0, *itertools.accumulate(sizes.tolist())]
        flat = np.empty(bounds[-1], np.uint8)
        flat[bounds[channel.rank] : bounds[channel.rank + 1]] = data
        self._run(ring.all_gather(flat, bounds, channel), "all_gather", flat)
        return [json.loads(flat[start:stop].tobytes()) for start, stop in itertools.pairwise(bounds)]

    def listen(self) -> bool:
        """Move on all that is under way, and return False; a transport calls this now and then while it waits.

        A rank that this one waits for may wait itself, for this one's part in what another group sums.

        Raises:
            ContractError: ranks have made different collectives.
        """
        return self._contract.listen()

    def _move_all(self) -> None:
        for pending in tuple(self._everywhere):
            pending.advance()

    def _all_reduced(self, array: Array, op: str, what: str, name: str) -> Array:
        """Combine `array` over the ranks; `what` it is for, in the record of who waits for what."""
        begun: Share | None = None
        if self._node is not None and self._is_one_node and not self._under_way:
            made = self._node.all_reduce_at_once(array, op, name)
            if isinstance(made, bool):
                self._sequence += 1  # its messages, had it needed any, would have had this tag
                return array
            begun = made
        elif self._is_apart and not self._under_way:
            steps = self._shorts.all_reduce(self, array, op, name)
            if steps is not None:
                self._run_from(steps, what, array)
                return array
        if begun is None:
            check_writable(array)
            combination(op, array)  # refuses what it does not know
        words = (what, array) if what == name else (f"all_reduce {op}", array, name)
        channel = self._channel(*words, by_messages=False)
        self._start(self._all_reduce(array, op, channel, name, begun), what, array).wait()
        return array

    def _all_reduce(
        self,
        array: Array,
        op: str,
        channel: Channel,
        name: str,
        share: Share | None = None,
        wire: Wire | None = None,
    ) -> Steps:
        """Combine `array` in the node's memory, else by messages; `share`: where all share one, and it has begun."""
        if share is not None and array.dtype in node.COMPUTED:
            share.channel = channel
            yield share
            return
        combine, host = combination(op, array), contiguous(array)
        flat = host.reshape(-1)
        if self._is_apart:
            yield from wire.all_reduce(flat, channel) if wire else self._by_messages(flat, combine, channel)
            copy_back(host, array)
            return
        # What nodes cannot sum goes round among all ranks, each node's side by side.
        is_computed = flat.dtype in node.COMPUTED
        between = self._leaders if is_computed else list(itertools.chain(*self._nodes))
        is_spread, number = is_computed and len(between) > 1, 0
        if self._node is not None:
            share = share or self._node.all_reduce(flat, op, np.shape(array), name)
            share.channel = channel
            number = self._node.reserve() if is_spread else 0
            yield share
        if self.rank in between and len(between) > 1:
            there = channel.among(between)
            yield from wire.all_reduce(flat, there) if wire else self._by_messages(flat, combine, there)
        if self._node is not None and is_spread:
            share = self._node.spread(flat, number)
            share.channel = channel
            yield share
        copy_back(host, array)

    def _shard_sum(self, nodes: Sequence[Array], out: Array, layout: canonical.Layout, channel: Channel) -> Steps:
        host = contiguous(out)
        flat = [contiguous(node).reshape(-1) for node in nodes]
        yield from canonical.all_reduce(flat, host.reshape(-1), layout, channel)
        copy_back(host, out)

    def _by_messages(self, flat: HostArray, combine: np.ufunc, channel: Channel) -> Steps:
        """Return the all-reduce that costs least."""
        if self._is_short(flat, channel.world_size):
            return doubling.all_reduce(flat, combine, channel)
        return ring.all_reduce(flat, combine, channel)

    def _is_short(self, flat: HostArray, ranks: int) -> bool:
        """Return whether latency counts for more than bytes in an all-reduce of `flat`."""
        known = self.costs
        return known.of_doubling(flat.nbytes, ranks) < known.of_ring(flat.nbytes, ranks)

    def _reduce_scatter(self, flat: HostArray, channel: Channel) -> Steps:
        """Form the sum of this rank's chunk as `_all_reduce` does: where that is not in chunks, with all others."""
        if any(len(ranks) > 1 for ranks in self._nodes) or self._is_short(flat, self.world_size):
            yield from self._all_reduce(flat, "sum", channel, "")
        else:
            yield from ring.reduce_scatter(flat, ring.chunk_bounds(flat.size, channel.world_size), np.add, channel)

    def _start(self, steps: Steps, op: str, array: Array) -> Pending:
        """Start the collective that the newest channel was made for."""
        pending = Pending(steps, self._under_way, self._call(op, array), self._everywhere, self._note, self.listen)
        pending.advance()
        return pending

    def _run(self, steps: Steps, op: str, array: Array) -> None:
        self._start(steps, op, array).wait()

    def _run_from(self, steps: Steps, op: str, array: Array) -> None:
        """As `_run`, of steps that are likely to go through without waiting: nobody needs to know of these."""
        try:
            request = next(steps, None)
        except BaseException as error:
            failure = error  # which Python forgets here
            steps = (_raise(failure) for _ in range(1))  # so that it fails as a collective does, and stays in line
        else:
            if request is None:
                return
            steps = itertools.chain((request,), steps)
        self._run(steps, op, array)

    def _finish(self, request: Request, op: str, array: Array, peer: int) -> None:
        progress.waits(self._call(op, array), self.job_ranks[peer])
        try:
            # The other side may answer only after its all-reduce, which waits for this rank's part.
            while self._everywhere and not request.test():
                self.listen()
                for pending in tuple(self._everywhere):
                    pending.advance()
                os.sched_yield()
            request.wait()
        finally:
            progress.goes_on()

    def _call(self, op: str, array: Array) -> progress.Call:
        return progress.call(self._sequence, op, array.dtype.kind, array.dtype.itemsize, array.nbytes, self._group)

    def _channel(self, op: str, array: Array, name: str = "", *, by_messages: bool = True) -> Channel:
        """Begin a collective, and return what it sends and receives through.

        Args:
            op: what it is, in words.
            array: of the shape and the dtype that all ranks must have.
            name: what that is, in words.
            by_messages: whether nothing of it is announced in the node's memory.
        """
        self._sequence += 1
        made = called(self._sequence, op, array, name)
        self._contract.begin(made)
        if self._node is not None and by_messages:
            self._node.passes_by(made)
        return self._channel_of(made)

    def _channel_of(self, call: Call) -> Channel:
        return Channel(self, USER_TAGS + 1 + (call.sequence - 1) % _TAGS, call)

    @property
    def _leaders(self) -> list[int]:
        """The ranks that exchange what their nodes have summed: the first of each."""
        return [ranks[0] for ranks in self._nodes]

    @property
    def _is_apart(self) -> bool:
        """Whether there are others, and none shares memory with another one."""
        return len(self._nodes) == self.world_size > 1

    @property
    def has_groups(self) -> bool:
        """Whether this rank has been in a group that was split off."""
        return self._job._groups > 0

    @property
    def shares_memory(self) -> bool:
        """Whether all ranks share memory, so that sums of what `allocate` returns need no messages."""
        return len(self._nodes) == 1

    @property
    def _is_one_node(self) -> bool:
        """Whether there are others, and all share memory."""
        return self.shares_memory and self.world_size > 1

    def _check_rank(self, role: str, rank: int) -> None:
        if not 0 <= rank < self.world_size:
            raise CommError(f"{role} {rank} is not a rank: expected 0 to {self.world_size - 1}")

    def _check_peer(self, role: str, rank: int, tag: int) -> None:
        self._check_rank(role, rank)
        if rank == self.rank:
            raise CommError(f"{role} {rank} is this rank itself: copy the array instead")
        if not 0 <= tag < USER_TAGS:
            raise ConfigError(f"tag {tag}: expected 0 to {USER_TAGS - 1}")


def _raise(failure: BaseException) -> NoReturn:
    raise failure
