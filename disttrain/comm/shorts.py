"""Sums of what is short: recursive doubling, in heads alone, and without an object for each message.

Python takes longer over a call than short messages need. So what depends on operation, dtype, shape and name of an
array alone is prepared once, and no more is looked at than must be; where a message does not come at once, this rank
goes on as in any collective.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from disttrain.backend import Array
from disttrain.comm import doubling
from disttrain.comm.arrays import combination
from disttrain.comm.contract import Call, called
from disttrain.comm.costs import Costs
from disttrain.comm.doubling import Round
from disttrain.comm.heads import Heads, Letter, first_word
from disttrain.comm.pending import ROOM, HostArray, Repeated, Steps

if TYPE_CHECKING:
    from disttrain.comm.base import Communicator

_KINDS = 16  # of arrays for which sums are kept prepared, each with memory of its own


class Shorts:
    """The sums of short arrays of a communicator."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[Any, ...], _Kind] = {}
        self._costs: Costs | None = None

    def all_reduce(self, comm: "Communicator", array: Array, op: str, name: str) -> Steps | None:
        """Return the steps of an all-reduce, the next of this rank; they yield only what does not come at once.

        Args:
            comm: whose it is.
            array: as of `Communicator.all_reduce`, as `op` and `name` are.
            op: what is formed.
            name: what it is.

        Returns:
            None, with nothing begun, where the array is not short, or must be prepared first, or cannot be summed.
        """
        if not isinstance(array, np.ndarray) or array.nbytes > ROOM:
            return None
        flags = array.flags
        if not flags.c_contiguous or not flags.writeable:
            return None
        if comm.costs is not self._costs:  # by which it was chosen what is short
            self._kinds, self._costs = {}, comm.costs
        key = (op, array.dtype, array.shape, name)
        kind = self._kinds.get(key) or self._prepare(comm, array, op, name)
        if kind is None or not comm._contract.notes(comm._sequence + 1, kind.terms):
            return None
        comm._sequence += 1
        return _steps(comm, kind, array)

    def _prepare(self, comm: "Communicator", array: HostArray, op: str, name: str) -> "_Kind | None":
        if array.dtype.hasobject or not comm._is_short(array, comm.world_size):
            return None
        call = called(0, f"all_reduce {op}", array, name)
        kind = _Kind(
            terms=call[1:-1],
            mark=call.mark,
            nbytes=array.nbytes,
            combine=combination(op, array),
            rounds=[_Prepared.of(each, comm, array, call) for each in doubling.rounds(comm.rank, comm.world_size)],
        )
        if len(self._kinds) == _KINDS:
            del self._kinds[next(iter(self._kinds))]
        self._kinds[op, array.dtype, array.shape, name] = kind
        return kind


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """What sums of the same operation, dtype, shape and name have in common.

    Attributes:
        terms: of their calls, from the operation to the digest.
        mark: of their calls.
        nbytes: of an array.
        combine: of two arrays.
        rounds: of this rank.
    """

    terms: tuple[Any, ...]
    mark: int
    nbytes: int
    combine: Callable[..., Any]
    rounds: "list[_Prepared]"


class _Prepared(NamedTuple):
    """A round that is prepared.

    Attributes:
        round: what it is.
        heads: that pass between this rank and the other one.
        words: of the head that is sent.
        sent: what that carries.
        message: what sends it.
        received: what the other rank's head carries.
    """

    round: Round
    heads: Heads
    words: memoryview
    sent: HostArray
    message: Repeated
    received: HostArray

    @classmethod
    def of(cls, one: Round, comm: "Communicator", array: HostArray, call: Call) -> "_Prepared":
        """Return a round of the sum of `array`."""
        letter, heads = Letter(array.nbytes), comm._contract.heads_of(one.peer)
        letter.words[1] = call.mark
        return cls(
            round=one,
            heads=heads,
            words=letter.words,
            sent=letter.as_array(array.dtype, array.shape),
            message=heads.prepare(letter),
            received=heads.newest.as_array(array.dtype, array.shape),
        )


def _steps(comm: "Communicator", kind: _Kind, array: HostArray) -> Steps:
    number, channel, quietly, combine = comm._sequence, None, comm.quietly, kind.combine
    word = first_word(number, kind.nbytes)
    for one, heads, words, sent, message, received in kind.rounds:
        peer, sends, receives, is_first, is_result = one
        if receives:
            heads.ask()
        if sends:
            words[0] = word
            sent[...] = array
            message.start()
            comm.bytes_sent += kind.nbytes
        if receives:
            if not heads.brings(word, kind.mark):
                channel = channel or comm._channel_of(comm._contract.own(number))
                received = np.empty_like(array)
                yield channel.receive(received.reshape(-1), peer, rides=ROOM)
            if is_result:
                array[...] = received
            elif is_first:
                quietly(combine, received, array, out=array)
            else:
                quietly(combine, array, received, out=array)
        if sends and not message.test():
            yield message
