"""Collectives and messages in the graph: what a rank's loss owes to other ranks flows back to them.

What is differentiated is the sum of all ranks' losses. So the gradient of a sum over ranks is the sum of the ranks'
cotangents, that of a broadcast is the sum at its root, and that of a message is a message back. Backward on every rank
makes the calls of forward in the opposite order, whether this rank needs a gradient or not: others need its part. So on
every rank the result must be part of what is differentiated, with weight 0 if need be.

Source: Utke, Hascoet, Heimbach, Hill, Hovland & Naumann, "Toward adjoinable MPI", 2009; that `send` returns a value to
be differentiated is ChainerMN's.
"""

from typing import Any, Protocol

import numpy as np

from disttrain.autodiff import Tensor, op, ops
from disttrain.autodiff.op import Call, Recorded, array_of, is_recording
from disttrain.backend import Array, get_array_module
from disttrain.comm import current
from disttrain.comm.base import USER_TAGS, Communicator
from disttrain.comm.ring import chunk_bounds
from disttrain.errors import ConfigError, unknown_name

__all__ = ["all_gather", "all_reduce", "broadcast", "recv", "reduce_scatter", "send", "send_recv"]

_TAGS = USER_TAGS // 2  # for users; what goes back has the other half, and what goes back of that the first again


class Summed(Protocol):
    """Who hold parts of a sum: a communicator's ranks, or the shards of a batch."""

    def all_reduce(self, array: Array) -> Array:
        """Replace `array` by the sum over all, in place, and return it."""


def all_reduce(x: Any, op: str = "sum", *, comm: Communicator | None = None) -> Any:
    """Return the sum of all ranks' `x`, the same bits on all. Shape: as `x`.

    Args:
        x: a Tensor or an array.
        op: ``"sum"`` or ``"mean"``.
        comm: by default the one in use.
    """
    comm = _checked_op(op, comm)
    summed = total(_rooted(x), comm=comm)
    return summed if op == "sum" else summed / comm.world_size


def all_gather(x: Any, *, comm: Communicator | None = None) -> Any:
    """Return the `x` of all ranks, shape ``(world_size, *x.shape)``."""
    comm, x = comm or current(), _rooted(x)
    return _gather_rows(ops.reshape(x, shape=(1, *x.shape)), length=comm.world_size, comm=comm)


def reduce_scatter(x: Any, op: str = "sum", *, comm: Communicator | None = None) -> Any:
    """Return this rank's rows of the sum of all ranks' `x`, shape ``(n, ...)``; see `Communicator.reduce_scatter`.

    Args:
        x: a Tensor or an array.
        op: ``"sum"`` or ``"mean"``.
        comm: by default the one in use.
    """
    comm = _checked_op(op, comm)
    summed = _scatter_rows(_rooted(x), comm=comm)
    return summed if op == "sum" else summed / comm.world_size


def broadcast(x: Any, root: int = 0, *, comm: Communicator | None = None) -> Any:
    """Return the `x` of rank `root`; that of others says shape and dtype only, and has a gradient of 0."""
    return _broadcast(_rooted(x), root=root, comm=comm or current())


def send(x: Any, dest: int, *, tag: int = 0, comm: Communicator | None = None) -> Any:
    """Send `x` to rank `dest`, and return a 0 of shape ``()`` through which the gradient comes back.

    Add it to the loss: ``loss = loss + send(x, dest)``. Like MPI's, a send may block until it is received; ranks that
    send to each other use `send_recv`.

    Args:
        x: a Tensor or an array.
        dest: another rank, which calls `recv`.
        tag: from 0 to 8191; tells messages of one source apart.
        comm: by default the one in use.
    """
    return _send(_rooted(x), dest=dest, tag=_checked(tag), comm=comm or current())


def recv(like: Any, source: int, *, tag: int = 0, comm: Communicator | None = None) -> Any:
    """Return the Tensor that rank `source` sends.

    Args:
        like: of the shape and dtype of what comes. Its gradient is 0; to differentiate once more, give a Tensor that
            requires a gradient, and use that: it is the message back.
        source: another rank, which calls `send`.
        tag: as of `send`.
        comm: by default the one in use.
    """
    return _recv(_rooted(like), source=source, tag=_checked(tag), comm=comm or current())


def send_recv(x: Any, dest: int, source: int, *, tag: int = 0, comm: Communicator | None = None) -> Any:
    """Send `x` to rank `dest`, and return the Tensor of the same shape and dtype that rank `source` sends meanwhile.

    Every rank that receives also sends, as in a ring: ``send_recv(x, (rank + 1) % size, (rank - 1) % size)``.
    """
    return _send_recv(_rooted(x), dest=dest, source=source, tag=_checked(tag), comm=comm or current())


@op
def total(x: Array, *, comm: Summed) -> Array:
    """Return the sum of all ranks' `x`: as `all_reduce`, for ranks that all need a gradient of `x` or all need none."""
    return comm.all_reduce(get_array_module(x).array(x))


@total.into
def _(x: Array, out: Array, *, comm: Summed) -> None:
    out[...] = x
    comm.all_reduce(out)


@total.vjp
def _(g: Array, _y: Array, _x: Array, *, comm: Summed) -> tuple[Array, ...]:
    return (total(_same(g), comm=comm),)


@op
def _total_of(*parts: Array, comm: Any) -> Array:
    """Return the sum of what several parts, all of this rank, and the other ranks give to `total`."""
    return comm.total([get_array_module(part).array(part) for part in parts])


total.of_parts = _total_of


@op
def _gather_rows(x: Array, *, length: int, comm: Communicator) -> Array:
    """Return the rows of all ranks one after the other, `length` in all, divided as `reduce_scatter` divides them."""
    bounds = chunk_bounds(length, comm.world_size)
    rows = np.diff(bounds)
    if rows.min() == rows.max():
        return comm.all_gather(x).reshape(length, *x.shape[1:])
    xp = get_array_module(x)
    padded = xp.zeros((int(rows.max()), *x.shape[1:]), x.dtype)
    padded[: len(x)] = x
    gathered = comm.all_gather(padded)
    return xp.concatenate([chunk[:count] for chunk, count in zip(gathered, rows.tolist(), strict=True)])


@_gather_rows.vjp
def _(g: Array, _y: Array, _x: Array, *, length: int, comm: Communicator) -> tuple[Array, ...]:
    return (_scatter_rows(_same(g), comm=comm),)


@op
def _scatter_rows(x: Array, *, comm: Communicator) -> Array:
    return comm.reduce_scatter(x)


@_scatter_rows.vjp
def _(g: Array, _y: Array, _x: Array, *, comm: Communicator) -> tuple[Array, ...]:
    return (_gather_rows(_same(g), length=_x.shape[0], comm=comm),)


@op
def _broadcast(x: Array, *, root: int, comm: Communicator) -> Array:
    return comm.broadcast(get_array_module(x).array(x), root)


@_broadcast.vjp
def _(g: Array, _y: Array, _x: Array, *, root: int, comm: Communicator) -> tuple[Array, ...]:
    return (_reduce(_same(g), root=root, comm=comm),)


@op
def _reduce(x: Array, *, root: int, comm: Communicator) -> Array:
    """Return the sum of all ranks' `x` at the root, elsewhere 0."""
    summed = comm.all_reduce(get_array_module(x).array(x))
    return summed if comm.rank == root else get_array_module(x).zeros_like(summed)


@_reduce.vjp
def _(g: Array, _y: Array, _x: Array, *, root: int, comm: Communicator) -> tuple[Array, ...]:
    return (_broadcast(_same(g), root=root, comm=comm),)


@op
def _send(x: Array, *, dest: int, tag: int, comm: Communicator) -> Array:
    comm.send(x, dest, tag)
    return get_array_module(x).zeros((), x.dtype)


@_send.vjp
def _(g: Array, y: Array, _x: Array, *, dest: int, tag: int, comm: Communicator) -> tuple[Array, ...]:
    like = ops.broadcast_to(_after(_same(g), y), shape=_x.shape)
    return (_recv(like, source=dest, tag=_back(tag), comm=comm),)


@op
def _recv(like: Array, *, source: int, tag: int, comm: Communicator) -> Array:
    return get_array_module(like).asarray(comm.recv(np.empty(like.shape, like.dtype), source, tag))


@_recv.vjp
def _(g: Array, y: Array, _like: Array, *, source: int, tag: int, comm: Communicator) -> tuple[Array, ...]:
    zero = _send(_after(_same(g), y), dest=source, tag=_back(tag), comm=comm)
    return (ops.broadcast_to(zero, shape=_like.shape),)


@op
def _send_recv(x: Array, *, dest: int, source: int, tag: int, comm: Communicator) -> Array:
    if dest == source == comm.rank:
        return get_array_module(x).array(x)
    sent = comm.isend(x, dest, tag)
    arrived = comm.recv(np.empty(x.shape, x.dtype), source, tag)
    sent.wait()
    return get_array_module(x).asarray(arrived)


@_send_recv.vjp
def _(g: Array, _y: Array, _x: Array, *, dest: int, source: int, tag: int, comm: Communicator) -> tuple[Array, ...]:
    return (_send_recv(_same(g), dest=source, source=dest, tag=_back(tag), comm=comm),)


@op
def _after(x: Array, _y: Array) -> Array:
    """Return `x`, as if it depended on `y`: where one rank differentiates a message twice, the other must too."""
    return x


@_after.vjp
def _(g: Array, _output: Array, _x: Array, _y: Array) -> tuple[Array, ...]:
    return g, None if _y is None else get_array_module(array_of(g)).zeros(_y.shape, _y.dtype)


@op
def _origin() -> Array:
    """Stand for what a Tensor without gradient comes from; recorded by `_same`, and never called."""
    raise NotImplementedError


@_origin.vjp
def _(_g: Array, _y: Array) -> tuple[Array, ...]:
    return ()


def _rooted(x: Any) -> Tensor:
    """Return `x` as a Tensor that takes part in backward, though nothing behind it may want a gradient."""
    return _same(x if isinstance(x, Tensor) else Tensor(x))  # type: ignore[no-any-return]


def _same(x: Any) -> Any:
    """Return `x`; where calls are recorded, a Tensor that takes part in backward."""
    if not isinstance(x, Recorded) or x.requires_grad or x.data.dtype.kind != "f" or not is_recording():
        return x
    return Tensor.of_call(x.data, Call(_origin, (), [], {}, x.data, Tensor))


def _checked_op(op: str, comm: Communicator | None) -> Communicator:
    """Return `comm`, or the one in use, if `op` is known: before anything is sent."""
    if op not in ("sum", "mean"):
        raise unknown_name("op", op, ("sum", "mean"))
    return comm or current()


def _checked(tag: int) -> int:
    if not 0 <= tag < _TAGS:
        raise ConfigError(f"tag {tag}: expected 0 to {_TAGS - 1}")
    return tag


def _back(tag: int) -> int:
    return (tag + _TAGS) % USER_TAGS


for _op in (
    total,
    _total_of,
    _gather_rows,
    _scatter_rows,
    _broadcast,
    _reduce,
    _send,
    _recv,
    _send_recv,
    _after,
    _origin,
):
    _op.is_collective = True
