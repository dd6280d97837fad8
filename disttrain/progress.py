"""The progress record: where a rank stands, in memory that its supervisor reads without its help, dead or stopped.

One word goes the other way: it asks the rank to end.

A record is a file of a few words of 8 bytes, mapped into memory. Each is written by one aligned store, so that a
reader never sees half a word; words that belong together are believed once they no longer change. When they changed
who reads it sees for himself; only what a rank has spent on what it adds up itself, by a clock that nobody can set.
Without a supervisor the words lie in private memory, and nobody reads them.
"""

import contextlib
import mmap
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from time import monotonic_ns
from typing import NamedTuple


class Phase(IntEnum):
    """What a rank is doing; `number` of the record counts within some of them."""

    SCRIPT = 0
    JOIN = 1
    FIT = 2
    DATA = 3
    FORWARD = 4  # and loss; in a plan up to the first gradient that is final
    BACKWARD = 5  # number: how many buckets' sums have begun
    BUCKET = 6  # number: the bucket whose sum is waited for
    METRICS = 7
    OPTIMIZER = 8
    CALLBACK = 9
    CHECKPOINT = 10
    VALIDATION = 11  # number: the batch; inside `fit`, so with batches of the training's size
    EVALUATION = 12  # number: the batch
    PREDICTION = 13
    SHUTDOWN = 14
    LEFT = 15


_WORDS = {
    Phase.SCRIPT: "the script's own code",
    Phase.JOIN: "joining the job",
    Phase.FIT: "preparing fit()",
    Phase.DATA: "data",
    Phase.FORWARD: "forward",
    Phase.BACKWARD: "backward, {} bucket(s) on their way",
    Phase.BUCKET: "bucket {}",
    Phase.METRICS: "metrics",
    Phase.OPTIMIZER: "optimizer",
    Phase.CALLBACK: "callback",
    Phase.CHECKPOINT: "checkpoint",
    Phase.VALIDATION: "evaluation, batch {}",
    Phase.EVALUATION: "evaluation, batch {}",
    Phase.PREDICTION: "prediction",
    Phase.SHUTDOWN: "shutdown",
    Phase.LEFT: "the end",
}


class Spent(NamedTuple):
    """What a rank has spent on what, in nanoseconds since it began; what is none of these is in no step.

    Attributes:
        data: until it had the next batch.
        compute: forward, backward, metrics and optimizer.
        callbacks: callbacks, and the script's own code.
        network: to send, and until a message was sent.
        waiting: for other ranks.
    """

    data: int = 0
    compute: int = 0
    callbacks: int = 0
    network: int = 0
    waiting: int = 0


_OF_A_STEP = {Phase.FORWARD, Phase.BACKWARD, Phase.BUCKET, Phase.METRICS, Phase.OPTIMIZER}
_OPS = ("", "all_reduce", "reduce_scatter", "all_gather", "broadcast", "barrier", "send", "recv", "shard_sum")
_MESSAGES = ("send", "recv")
_KINDS = {"f": "float", "i": "int", "u": "uint", "b": "bool", "c": "complex"}

# The places of the words; the host's name lies behind them.
_PLACE, _PID, _RUN, _STEP, _PHASE, _CALL, _WHAT, _BYTES, _PEER, _WAITS, _ASKED, _SAMPLES = range(12)
_DATA, _COMPUTE, _CALLBACKS, _NETWORK, _WAITING, _OTHER = range(12, 18)  # nanoseconds, as of `Spent`
_HOST = slice(256, 384)
_RECORD_BYTES = 384

_SPENT_ON = {
    **dict.fromkeys(Phase, _OTHER),
    **dict.fromkeys((Phase.FORWARD, Phase.BACKWARD, Phase.METRICS, Phase.OPTIMIZER), _COMPUTE),
    **dict.fromkeys((Phase.CALLBACK, Phase.SCRIPT), _CALLBACKS),
    Phase.DATA: _DATA,
    Phase.BUCKET: _NETWORK,
}
_places = tuple(_SPENT_ON[each] for each in Phase)  # by phase: found in half the time
_NS = (1 << 64) - 1  # two threads that take turns may take a moment from each other, and no word is negative

Call = tuple[int, int, int]  # sequence number; op, dtype and group in one number; bytes

_code_of = {name: code for code, name in enumerate(_OPS)}


@dataclass(frozen=True, kw_only=True)
class Proxy:
    """What stands for the process of a rank on another host.

    Attributes:
        pid: of a process on the reader's host, which takes signals for it.
        state: of the rank's process, as psutil has it; empty when it has ended.
        effort: changes when it, or a process that it has started, has used processor or disk.
        kernel: what the kernel there tells of it.
    """

    pid: int
    state: str = "running"
    effort: str = ""
    kernel: str = ""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a rank's record says.

    Attributes:
        rank: whose it is.
        world_size: of how many.
        pid: of its process, on `host`.
        host: where.
        run: how many calls of `fit` have begun.
        step: number of the step that was begun last, over all epochs, None before the first.
        phase: what it does.
        number: of the bucket or batch.
        call: the collective or message that it has waited for last: sequence number, name, dtype, bytes.
        peer: the rank that it waits for, where that is known.
        is_waiting: whether it waits still.
        waits: how many times it has waited; tells two equal calls apart.
        group: number of the group of ranks whose call it is; 0 for that of all.
        proxy: what stands for its process, where `host` is not the reader's.
        samples: how many its steps have had.
        spent: on what.
    """

    rank: int
    world_size: int
    pid: int
    host: str
    run: int
    step: int | None
    phase: Phase
    number: int
    call: tuple[int, str, str, int]
    peer: int | None
    is_waiting: bool
    waits: int
    group: int = 0
    proxy: Proxy | None = field(default=None, compare=False)
    samples: int = field(default=0, compare=False)
    spent: Spent = field(default=Spent(), compare=False)

    @property
    def pid_here(self) -> int:
        """The process on the reader's host that takes signals for it."""
        return self.pid if self.proxy is None else self.proxy.pid

    @property
    def begun(self) -> tuple[int, int]:
        """How many calls of `fit`, and how many steps over all epochs, have begun."""
        return self.run, 0 if self.step is None else self.step + 1

    @property
    def words(self) -> str:
        """Where the rank is, as in ``step 7, forward``."""
        text = _WORDS[self.phase].format(self.number)
        if self.phase in _OF_A_STEP:
            text = f"step {self.step}, {text}"
        else:
            text += ", before its first step" if self.step is None else f", after step {self.step}"
        return f"{text}; waits in {self.call_words}" if self.is_waiting else text

    @property
    def call_words(self) -> str:
        """What it waits for, as in ``all_reduce 23 (float32, 4096 bytes), for rank 2``."""
        return self.what_words + ("" if self.peer is None else f", for rank {self.peer}")

    @property
    def what_words(self) -> str:
        """What it waits for, without the rank."""
        sequence, op, dtype, size = self.call
        number = "" if op in _MESSAGES else f" {sequence}"
        group = f" of group {self.group}" if self.group else ""
        return f"{op}{number}{group} ({dtype}, {size} bytes)"


def _private() -> memoryview:
    return memoryview(bytearray(_RECORD_BYTES)).cast("Q")


_words = _private()
_place, _since_ns = _OTHER, 0  # what time is spent on, and since when


def keep(path: Path, rank: int, world_size: int) -> None:
    """Keep this process's record in the file `path` from now on.

    Raises:
        OSError: the file cannot be made.
    """
    global _words
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.truncate(descriptor, _RECORD_BYTES)
        shared = memoryview(mmap.mmap(descriptor, _RECORD_BYTES))
    finally:
        os.close(descriptor)
    shared[_HOST] = socket.gethostname().encode()[:127].ljust(128, b"\0")
    words = shared.cast("Q")
    words[_PID] = os.getpid()
    words[_PLACE] = world_size << 32 | rank  # last: with it the record is complete
    _words = words


def shrunk_to(world_size: int) -> None:
    """Note that only so many ranks are left; this one's number stays that which its launcher has given it."""
    _words[_PLACE] = world_size << 32 | _words[_PLACE] & 0xFFFFFFFF


def is_kept() -> bool:
    """Return whether this process's record is one that a supervisor reads."""
    return isinstance(_words.obj, mmap.mmap)


def read(path: Path) -> Record | None:
    """Return the record in the file `path`, None where there is none yet."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    return _decode(data) if len(data) == _RECORD_BYTES else None


def ask_to_end(path: Path) -> None:
    """Ask the process whose record is in the file `path` to end `fit` after a step, with its state remembered.

    Raises:
        OSError: there is no such record.
    """
    with open(path, "r+b") as file:
        file.seek(_ASKED * 8)
        file.write((1).to_bytes(8, sys.byteorder))


def is_asked_to_end() -> bool:
    """Return whether somebody has asked this process to end."""
    return bool(_words[_ASKED])


def own() -> Record:
    """Return this process's record."""
    record = _decode(_words.tobytes(), empty=True)
    assert record is not None
    return record


def at(phase: Phase, number: int = 0) -> None:
    """Note what this rank does from now on."""
    _words[_PHASE] = number << 8 | phase
    if _places[phase] != _place:
        _spend(_places[phase])


def begin_run() -> None:
    """Note that a call of `fit` begins: its steps may take longer than those before."""
    _words[_RUN] += 1


def begin_step(number: int, samples: int = 0) -> None:
    """Note that step `number`, counted from 0 over all epochs, begins with its forward pass of so many samples."""
    _words[_STEP] = number + 1
    _words[_SAMPLES] += samples
    at(Phase.FORWARD)


@contextlib.contextmanager
def phase(name: Phase) -> Iterator[None]:
    """Note what this rank does inside a ``with`` block.

    Under a supervisor an exception that leaves it says in a note where it arose, unless that is before the first step
    of all: its traceback says as much.
    """
    before = _words[_PHASE]
    at(name)
    try:
        yield
    except BaseException as error:
        if is_kept() and _words[_STEP] and not hasattr(error, "__notes__"):
            error.add_note(own().words)
        raise
    finally:
        _words[_PHASE] = before
        _spend(_places[before & 0xFF])


def call(sequence: int, op: str, kind: str, itemsize: int, nbytes: int, group: int = 0) -> Call:
    """Return a collective or a message as `waits` takes it.

    Args:
        sequence: number of the collective among all of this rank, counted from 1.
        op: its name.
        kind: of the dtype, as NumPy has it.
        itemsize: of the dtype.
        nbytes: of the array.
        group: number of the group of ranks that call; 0 for all.
    """
    return sequence, _code_of[op] | ord(kind) << 8 | (itemsize & 0xFFFF) << 16 | (group & 0xFFFFFFFF) << 32, nbytes


def waits(call: Call, peer: int | None = None) -> None:
    """Note that this rank waits for a collective, or for a message of rank `peer`."""
    words = _words
    words[_WHAT], words[_BYTES] = call[1], call[2]
    words[_PEER] = 0 if peer is None else peer + 1
    words[_WAITS] += 1
    words[_CALL] = call[0] << 1 | 1
    if _place != _WAITING:
        _spend(_WAITING)


def waits_for(peer: int, *, to_send: bool = False) -> None:
    """Note which rank this one waits for in the collective that it waits in; `to_send`: to take its message."""
    _words[_PEER] = peer + 1
    place = _NETWORK if to_send else _WAITING
    if place != _place:
        _spend(place)


def goes_on() -> None:
    """Note that this rank no longer waits."""
    words = _words
    words[_CALL] &= ~1
    _spend(_places[words[_PHASE] & 0xFF])


def sends() -> int:
    """Note that this rank begins to send a message, and return what `has_sent` is to be given."""
    before = _place
    _spend(_NETWORK)
    return before


def has_sent(before: int) -> None:
    """Note that what was begun by `sends` is done."""
    _spend(before)


def _spend(place: int) -> None:
    """Add the time since the last call to what it was spent on; from now on it is spent on `place`."""
    global _place, _since_ns
    now_ns = monotonic_ns()
    _words[_place] = _words[_place] + now_ns - _since_ns & _NS
    _place, _since_ns = place, now_ns


def _decode(data: bytes, *, empty: bool = False) -> Record | None:
    words = memoryview(data).cast("Q")
    if not words[_PLACE] and not empty:
        return None
    what = words[_WHAT]
    kind, bits = chr(what >> 8 & 0xFF), (what >> 16 & 0xFFFF) * 8
    dtype = "bool" if kind == "b" else f"{_KINDS.get(kind, kind)}{bits}"
    return Record(
        rank=words[_PLACE] & 0xFFFFFFFF,
        world_size=words[_PLACE] >> 32,
        pid=words[_PID],
        host=data[_HOST].rstrip(b"\0").decode(errors="replace"),
        run=words[_RUN],
        step=words[_STEP] - 1 if words[_STEP] else None,
        phase=Phase(words[_PHASE] & 0xFF),
        number=words[_PHASE] >> 8,
        call=(words[_CALL] >> 1, _OPS[what & 0xFF], dtype, words[_BYTES]),
        peer=words[_PEER] - 1 if words[_PEER] else None,
        is_waiting=bool(words[_CALL] & 1),
        waits=words[_WAITS],
        group=what >> 32,
        samples=words[_SAMPLES],
        spent=Spent(*words[_DATA:_OTHER]),
    )


def _forget() -> None:
    """In a child that was forked: the record is its parent's."""
    global _words
    _words = _private()


os.register_at_fork(after_in_child=_forget)
