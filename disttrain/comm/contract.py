"""The contract: every rank makes the same collectives in the same order, and ranks that do not are told so at once.

A collective's first message to a rank goes behind a head of 16 bytes, with a digest of what was called, or, where it is
short, in one message with that: the receiver compares it with its own call before it uses any of the data. In a node's
memory the ranks' announcements are compared instead, by the kernel. Neither costs a round trip. Where nothing meets
that could be compared, because one rank waits in shared memory and another for messages, or both wait, whoever has
waited for a while says in what, to the rank that it waits for.

A rank that finds a difference tells all ranks; each says what it has called, and all raise the same words.
"""

import functools
import hashlib
import json
import weakref
import zlib
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn
from weakref import WeakValueDictionary

import numpy as np

from disttrain.comm.heads import Heads
from disttrain.comm.pending import HostArray, Request
from disttrain.comm.waiting import PATIENCE_S, caller, wait_until
from disttrain.errors import CommError, ContractError

if TYPE_CHECKING:
    from disttrain.comm.base import Communicator

TAG = 1 << 14  # the first of those that are not the user's
_TEXT = 100  # characters of a name or a path
_SETTLE_S = 1.0  # for which a difference waits for what other ranks say: one of them may be busy
_name_of = functools.cache(str)  # of a dtype: NumPy makes it anew each time, in 3 us
_make = tuple.__new__  # what a NamedTuple does, without a call of Python's
# Calls between one into the library and that of `caller`, at least: by `called`, and by `notes`.
_DEPTH, _DEPTH_OF_SHORT = 3, 5
_KEPT = 4096  # calls that a rank remembers: more than are ever under way
_TOLD_BYTES = 4000  # of a control message, at most


class Call(NamedTuple):
    """A collective, as one rank has called it.

    Attributes:
        sequence: number among all collectives of this rank, from 1.
        op: what is done, as in ``"all_reduce sum"``.
        dtype: of the array.
        shape: of the array.
        name: what it is, in words; may be empty.
        digest: of the whole name.
        place: file and line of the call into the library; empty where only the announcement is known.
    """

    sequence: int
    op: str
    dtype: str
    shape: Sequence[int]
    name: str
    digest: int
    place: str

    @property
    def terms(self) -> tuple[Any, ...]:
        """What must be equal on all ranks, by its order in `_TERMS`."""
        return self.sequence, self.op, self.dtype, tuple(self.shape), self.digest

    @property
    def mark(self) -> int:
        """A digest of all that must be equal but the number: of 64 bits."""
        return _mark(self.op, self.dtype, tuple(self.shape), self.digest)

    @property
    def words(self) -> str:
        """As in ``call 3, all_reduce sum of (5,) float32 (gradients of dense/kernel), at train.py:12``."""
        if not self.op:
            return f"call {self.sequence}, of which it has said nothing"
        array = "" if self.op in _WITHOUT_ARRAY else f" of {tuple(self.shape)} {self.dtype}"
        name = f" ({self.name})" if self.name else ""
        place = f", at {self.place}" if self.place else ""
        return f"call {self.sequence}, {self.op}{array}{name}{place}"


_WITHOUT_ARRAY = ("barrier", "all_gather_json")
_TERMS = ("number", "operation", "dtype", "shape", "name")


def called(sequence: int, op: str, array: HostArray, name: str) -> Call:
    """Return the call of whoever calls the library; see `Call`."""
    digest = zlib.crc32(name.encode()) if name else 0
    place = caller(_DEPTH)[-_TEXT:]
    return _make(Call, (sequence, op, _name_of(array.dtype), array.shape, name[:_TEXT], digest, place))


@functools.lru_cache(maxsize=1024)
def _mark(op: str, dtype: str, shape: tuple[int, ...], digest: int) -> int:
    text = f"{op} {dtype} {shape} {digest}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


class Contract:
    """What this rank has called in a communicator, and what others have told it of their calls there.

    Control messages are the job's, whatever group they are about, and name ranks as the job does: whoever waits hears
    of differences in other groups as well.

    Attributes:
        groups: in the job's contract, those of the groups that this rank is in, by their keys.
    """

    def __init__(self, comm: "Communicator") -> None:
        self._comm: Communicator = weakref.proxy(comm)  # which has this, and is dropped when nobody else has it
        self.groups: WeakValueDictionary[tuple[int, int], Contract] = WeakValueDictionary()
        self._failure: ContractError | None = None
        self._own: OrderedDict[int, Call] = OrderedDict()  # of a dict the first would be found ever more slowly
        self._early: defaultdict[int, list[tuple[int, Told]]] = defaultdict(list)  # of collectives still to come here
        # what heads have brought that are here, and were compared, by rank and number
        self._come: dict[tuple[int, int], HostArray] = {}
        self._heads: dict[int, Heads] = {}  # by rank

    def begin(self, call: Call) -> None:
        """Note a collective of this rank, before it sends or announces anything.

        Raises:
            ContractError: another rank has called another one, or ranks have differed before.
        """
        self._own[call.sequence] = call  # first: who hears of a difference says what it has called
        if len(self._own) > _KEPT:
            self._own.popitem(last=False)
        self._job._hear()
        if self._early:
            for rank, told in self._early.pop(call.sequence, ()):
                self._compare(rank, call.sequence, told)
            for sequence in [each for each in self._early if each < call.sequence]:
                del self._early[sequence]

    def notes(self, sequence: int, terms: tuple[Any, ...]) -> bool:
        """Note a collective of this rank, as `begin` does, of which all that others say is compared with heads.

        Args:
            sequence: of its `Call`.
            terms: what follows in that, up to the place.

        Returns:
            Whether it was noted: nothing has been heard that would have to be compared first.
        """
        if self._job._failure is not None or self._early or self._come:
            return False
        self._own[sequence] = _make(Call, (sequence, *terms, caller(_DEPTH_OF_SHORT)[-_TEXT:]))
        if len(self._own) > _KEPT:
            self._own.popitem(last=False)
        return True

    def own(self, sequence: int) -> Call:
        """Return this rank's collective of that number, which is under way."""
        return self._own[sequence]

    def job_rank(self, rank: int) -> int:
        """Return `rank` of this communicator, as the job numbers it."""
        return self._comm.job_ranks[rank]

    @property
    def rank(self) -> int:
        """This rank, as the job numbers it."""
        return self.job_rank(self._comm.rank)

    @property
    def _job(self) -> "Contract":
        return self._comm._job._contract

    @property
    def key(self) -> tuple[int, int]:
        """What tells this communicator from others: the number of the group, and the first of its ranks in the job."""
        return self._comm._group, self._comm.job_ranks[0]

    def listen(self) -> bool:
        """Hear what other ranks have told this one, of any group, and move on what is under way in all groups.

        Returns:
            False: it is no reason to stop waiting.

        Raises:
            ContractError: ranks differ; all of them raise the same words.
        """
        self._job._hear()
        self._comm._job._move_all()
        return False

    def _hear(self) -> None:
        """Hear what other ranks have told this one, of any group; of the job's contract."""
        if self._failure is not None:
            raise ContractError(*self._failure.args)
        while (told := self._comm._told()) is not None:
            rank, (key, subject, calls) = told[0], json.loads(told[1])
            contract = self if key[0] == 0 else self.groups.get(tuple(key))
            if subject == "differ":
                self._settle(tuple(key), {rank}, calls if contract is None else contract._statement(calls))
            elif contract is not None:
                call = Call(*calls[0][1])
                contract._compare(rank, call.sequence, call)

    def send_head(self, call: Call, dest: int, data: HostArray | None = None) -> Request:
        """Start to send to rank `dest` what this one has called, and with it a copy of `data`, at most `ROOM` bytes."""
        return self.heads_of(dest).send(call.sequence, call.mark, data)

    def has_come(self, rank: int, sequence: int, into: HostArray | None = None) -> bool:
        """Return whether the head of what `rank` sends in a collective is here; never blocks.

        Heads come in the order in which the other rank first sends, which may be another than that of the calls.

        Args:
            rank: the other rank.
            sequence: number of the collective.
            into: gets what the head carries, once it is here; C-contiguous, shape ``(n,)``. None: it carries nothing.

        Raises:
            ContractError: it says something else.
            CommError: it carries more or less.
        """
        data = self._come.pop((rank, sequence), None)
        while data is None:
            head = self.heads_of(rank).next()
            if head is None:
                return False
            number, mark, carried = head
            self._compare(self.job_rank(rank), number, mark)
            if number == sequence:
                data = carried
            else:
                self._come[rank, number] = carried.copy()
        expected = 0 if into is None else into.nbytes
        if data.nbytes != expected:
            raise CommError(
                f"rank {self.rank}: message from rank {self.job_rank(rank)} has {data.nbytes} bytes, expected "
                f"{expected}; all ranks must pass arrays of the same shape and dtype"
            )
        if into is not None:
            into.view(np.uint8)[...] = data
        return True

    def wait_for_head(self, rank: int) -> None:
        """Block until the next head from `rank` is here."""
        self.heads_of(rank).wait()

    def heads_of(self, rank: int) -> Heads:
        """Return the heads that pass between this rank and `rank`."""
        heads = self._heads.get(rank)
        if heads is None:
            heads = self._heads[rank] = Heads(self._comm, rank, TAG)
        return heads

    def say(self, call: Call, rank: int) -> None:
        """Tell the job's `rank`, for which this one waits, in what."""
        self._comm._job._tell(rank, _pack(self.key, "waits", [(self.rank, call)]))

    def differ(self, calls: Iterable[tuple[int, Call]]) -> NoReturn:
        """Raise on all ranks of the job that `calls`, with the ranks that made them, differ."""
        self._job._settle(self.key, set(), self._statement(calls))

    def _compare(self, rank: int, number: int, told: "Told") -> None:
        """Compare what the job's `rank` has told of a call with this one's of the same number, now or when it comes."""
        own = self._own.get(number)
        if own is None:
            self._early[number].append((rank, told))
        elif own.mark != (told.mark if isinstance(told, Call) else told):
            other = told if isinstance(told, Call) else Call(number, "", "", (), "", 0, "")
            self.differ([(self.rank, own), (rank, other)])

    def _statement(self, calls: Iterable[tuple[int, Any]]) -> "Statement":
        """Return what this rank knows of a difference, the calls in doubt first: as much as a message may hold."""
        known: Known = {}
        _learn(known, calls)
        for number in [*sorted({number for number, _ in known} & self._own.keys()), *reversed(self._own)]:
            known[number, self.rank] = self._own[number]
        told, room = [], _TOLD_BYTES
        for (_, rank), each in known.items():
            room -= len(_pack(self.key, "differ", [(rank, each)]))
            if room < 0:
                break
            told.append((rank, each))
        return told

    def _settle(self, key: tuple[int, int], heard: set[int], statement: "Statement") -> NoReturn:
        """Tell all ranks what this one knows, hear from all, and raise the same words as they; of the job's contract.

        What they raise depends on nothing but what all have told, so that it is the same. A rank that is busy is given
        a second, and more where nobody else knows what it has called.

        Args:
            key: of the communicator in which ranks differ.
            heard: ranks that have said what they know.
            statement: what this one says.
        """
        others = set(range(self._comm.world_size)) - {self.rank}
        for other in others:
            self._comm._tell(other, _pack(key, "differ", statement))
        known: defaultdict[tuple[int, int], Known] = defaultdict(dict)
        _learn(known[key], statement)

        def all_have_spoken() -> bool:
            while (told := self._comm._told()) is not None:
                where, subject, calls = json.loads(told[1])
                if subject == "differ":
                    heard.add(told[0])
                    _learn(known[tuple(where)], calls)
            return heard >= others

        def is_known() -> bool:
            gone = {rank for rank in others - heard if self._is_gone(rank)}  # before the last look at what it has said
            all_have_spoken()
            silent = others - heard - gone
            return not any(rank in silent and not call.place for (_, rank), call in known[min(known)].items())

        if not wait_until(all_have_spoken, _SETTLE_S):
            wait_until(is_known, PATIENCE_S)
        first = min(known)
        self._failure = ContractError(_words(known[first], first))
        raise self._failure

    def _is_gone(self, rank: int) -> bool:
        """Return whether the job's `rank` says nothing more."""
        try:
            return self._comm._serve(rank)
        except CommError:  # it, or another one, was lost: nobody is to be waited for
            return True


Told = Call | int  # what a rank says of a call: all of it, or its mark
Statement = list[tuple[int, Call]]  # calls, with the ranks that made them
Known = dict[tuple[int, int], Call]  # the same by number and rank


def _pack(key: tuple[int, int], subject: str, calls: Iterable[tuple[int, Call]]) -> bytes:
    """Return a control message."""
    return json.dumps([key, subject, [*calls]], ensure_ascii=False).encode()


def _learn(known: Known, calls: Iterable[tuple[int, Any]]) -> None:
    """Add `calls` to what is known; of two of the same number and rank the one that says where it was made."""
    for rank, fields in calls:
        each = Call(*fields)
        if each.place or (each.sequence, rank) not in known:
            known[each.sequence, rank] = each


def _words(known: Known, key: tuple[int, int]) -> str:
    """Return what all ranks raise, of calls by number and rank: it must depend on nothing else."""
    group, first_rank = key
    pair, what = sorted(known)[:2], "number"
    for number in sorted({number for number, _ in known}):
        terms = {rank: known[each, rank].terms for each, rank in sorted(known) if each == number}
        usual = Counter(terms.values()).most_common(1)[0][0]
        odd = [rank for rank in terms if terms[rank] != usual]
        if odd:
            like = next(rank for rank in terms if terms[rank] == usual)
            pair = [(number, like), (number, odd[0])]
            what = " and ".join(name for name, a, b in zip(_TERMS, usual, terms[odd[0]], strict=True) if a != b)
            break
    calls = "; ".join(f"rank {rank}: {known[number, rank].words}" for number, rank in sorted(pair, key=lambda p: p[1]))
    where = f" in the group of rank {first_rank}" if group else ""
    return (
        f"ranks make different calls{where}, the {what} differs: {calls}; every rank must make the same "
        "collectives in the same order, with arrays of the same shape and dtype"
    )
