"""Frames over byte pipes of any kind: here in memory, with as much room as a test gives them."""

import struct

import numpy as np
import pytest

from disttrain import env
from disttrain.comm.frames import CONTROL_BYTES, FramedCommunicator
from disttrain.errors import CommError

pytestmark = pytest.mark.timeout(30)


class MemoryPipe:
    """One end of two buffers of at most `room` bytes."""

    def __init__(self, to, from_, room):
        self.to, self.from_, self.room = to, from_, room
        self.writes = []

    def write(self, parts):
        data = b"".join(part.tobytes() for part in parts)[: self.room - len(self.to)]
        self.to += data
        self.writes += [len(data)] if data else []
        return len(data)

    def read(self, into):
        count = min(into.size, len(self.from_))
        into[:count] = np.frombuffer(bytes(self.from_[:count]), np.uint8)
        del self.from_[:count]
        return count


class MemoryCommunicator(FramedCommunicator):
    has_left = False

    def has_ended(self, rank):
        return self.has_left

    def abort(self, exit_code):
        raise SystemExit(exit_code)


def two_ranks(room):
    """Return both ranks, and what rank 0 sends through."""

    def pipes():
        there, back = bytearray(), bytearray()
        return MemoryPipe(there, back, room), MemoryPipe(back, there, room)

    data, controls = pipes(), pipes()
    ranks = [
        MemoryCommunicator(
            env.Place(launcher="", rank=rank, world_size=2, local_rank=rank, local_size=2),
            {1 - rank: data[rank]},
            {1 - rank: controls[rank]},
        )
        for rank in range(2)
    ]
    return *ranks, data[0]


@pytest.mark.parametrize("room", [1, 7, 16, 17, 1000, 1 << 20])
def test_messages_arrive_whole_whatever_the_room_of_the_pipe(room):
    here, there, _ = two_ranks(room)
    sent = [np.arange(size, dtype=np.int16) for size in (5, 0, 700, 1)]
    received = [np.zeros_like(each) for each in sent]
    requests = [here._isend(each, 1, tag) for tag, each in enumerate(sent)]
    requests += [there._irecv(each, 0, tag) for tag, each in reversed([*enumerate(received)])]
    while not all([request.test() for request in requests]):  # noqa: C419 - each of them
        pass
    assert [each.tolist() for each in received] == [each.tolist() for each in sent]


@pytest.mark.parametrize("tag", [0, 1 << 14, 1 << 62, -1])
def test_tags_have_64_bits(tag):
    here, there, _ = two_ranks(100)
    here._isend(np.ones(3, np.uint8), 1, tag)
    other, same = np.zeros(3, np.uint8), np.zeros(3, np.uint8)
    assert not there._irecv(other, 0, tag ^ 1 << 40).test()
    assert there._irecv(same, 0, tag).test()
    assert (same.tolist(), other.tolist()) == ([1, 1, 1], [0, 0, 0])


def test_a_message_goes_out_in_one_write_with_its_header():
    here, _, pipe = two_ranks(1 << 20)
    here._isend(np.ones(100, np.uint8), 1, 0)
    assert len(pipe.writes) == 1


@pytest.mark.parametrize("room", [3, 1 << 20])
def test_control_messages_pass_messages_that_nobody_has_asked_for(room):
    here, there, _ = two_ranks(room)
    unasked = here._isend(np.ones(1000), 1, 0)
    assert there._told() is None
    told = []
    for data in (b"first", b"", b"x" * CONTROL_BYTES):
        here._tell(1, data)
    while len(told) < 3:
        here.move()
        told += filter(None, [there._told()])
    assert told == [(0, b"first"), (0, b""), (0, b"x" * CONTROL_BYTES)]
    assert unasked.test() == (room > 8000)


def test_a_control_message_has_a_limit():
    here, _, _ = two_ranks(1)
    with pytest.raises(CommError, match="4097 bytes: expected at most 4096"):
        here._tell(1, b"x" * 4097)


@pytest.mark.parametrize("nbytes", [-1, 1 << 41])
def test_a_header_that_cannot_be_right_is_refused_before_memory_is_taken(nbytes):
    _, there, pipe = two_ranks(100)
    pipe.write([np.frombuffer(struct.pack("<qq", 0, nbytes), np.uint8)])
    with pytest.raises(CommError, match=f"from rank 0 announces {nbytes} bytes, expected at most 1099511627776"):
        there._irecv(np.zeros(3), 0, 0).test()


def test_a_peer_that_has_ended_is_named_unless_its_message_has_come():
    here, there, _ = two_ranks(100)
    here._isend(np.ones(3), 1, 0)
    there.has_left = True
    first, second = np.zeros(3), np.zeros(3)
    there._irecv(first, 0, 0).wait()
    assert first.tolist() == [1, 1, 1]
    with pytest.raises(CommError, match=r"rank 0 has left the job, .* and rank 1 waits for it in"):
        there._irecv(second, 0, 0).wait()


@pytest.mark.parametrize("is_asked_first", [False, True])
def test_a_message_may_be_shorter_than_asked_for_where_that_is_said(is_asked_first):
    here, there, _ = two_ranks(1 << 20)
    into, exact = np.zeros(10, np.uint8), np.zeros(10, np.uint8)
    requests = []
    for up_to, array in ((True, into), (False, exact)):
        if is_asked_first:
            requests.append(there._irecv(array, 0, int(up_to), up_to=up_to))
        here._isend(np.ones(4, np.uint8), 1, int(up_to))
        if not is_asked_first:
            requests.append(there._irecv(array, 0, int(up_to), up_to=up_to))
    assert requests[0].test()
    assert requests[0].test()  # it stays so
    assert into.tolist() == [1] * 4 + [0] * 6
    with pytest.raises(CommError, match="has 4 bytes, expected 10"):
        requests[1].test()


def test_a_message_is_never_longer_than_asked_for():
    here, there, _ = two_ranks(1 << 20)
    here._isend(np.ones(11, np.uint8), 1, 0)
    with pytest.raises(CommError, match="has 11 bytes, expected 10"):
        there._irecv(np.zeros(10, np.uint8), 0, 0, up_to=True).test()
