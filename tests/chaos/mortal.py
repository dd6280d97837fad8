"""Ranks in threads of which some die, where they send a message of a given number, and the others can shrink.

An error that leaves a rank ends all, as MPI_Abort does.
"""

import threading
import time

from disttrain.comm import use
from disttrain.comm.threads import ThreadCommunicator, _World
from disttrain.errors import DeadRankError

LIMIT_S = 60.0
WAIT_S = 0.01
AHEAD_S = 0.05  # in which others may go ahead before one dies, as far as they can without it


class Dead(BaseException):
    """What ends a rank that dies."""


class Aborted(BaseException):
    """What ends a rank because another one has failed."""


class World(_World):
    """A world that is of no use any more once one of its ranks is dead.

    Args:
        members: its ranks.
        aborted: set when the job is to end.
    """

    def __init__(self, members, aborted):
        super().__init__()
        self.members = set(members)
        self.aborted = aborted
        self.dead = set()
        self.shrinking = {}  # communicators by their ranks
        self.next = None


class Mortal(ThreadCommunicator):
    """A rank that dies instead of sending its message number `last`, counted from 0; None: never."""

    last = None
    sent = 0

    def _isend(self, array, dest, tag):
        self.check()
        if self.sent == self.last:
            self.die()
        self.sent += 1
        return super()._isend(array, dest, tag)

    def _irecv(self, array, source, tag, **how):
        self.check()
        return _Waiting(self, super()._irecv(array, source, tag, **how))

    def check(self):
        if self._world.aborted.is_set():
            raise Aborted
        if self._world.dead:
            raise DeadRankError("a rank is dead")

    def die(self):
        time.sleep(AHEAD_S)
        with self._world.changed:
            self._world.dead.add(self.rank)
            self._world.changed.notify_all()
        raise Dead

    def shrink(self):
        world = self._world
        with world.changed:
            world.shrinking[self.rank] = self
            if not world.dead:
                world.dead.add(None)  # revoked: another rank was lost while these shrank
            world.changed.notify_all()
            end_s = time.monotonic() + LIMIT_S
            while world.shrinking.keys() < world.members - world.dead:
                if world.aborted.is_set():
                    raise Aborted
                assert not world.returned, "it waits for a rank that has left"
                world.changed.wait(WAIT_S)
                assert time.monotonic() < end_s
            if world.next is None:
                world.next = World(range(len(world.shrinking)), world.aborted)
            places = sorted(world.shrinking)
            lost = sorted(world.dead - {None})
        ThreadCommunicator.__init__(
            self, rank=places.index(self.rank), world_size=len(places), local_rank=0, world=world.next
        )
        return lost


class _Waiting:
    """A message that never comes once a rank is dead."""

    def __init__(self, comm, message):
        self._comm, self._message = comm, message

    def test(self):
        self._comm.check()
        return self._message.test()

    def wait(self):
        while not self.test():
            time.sleep(1e-4)
            self._comm.listen()


def run(world_size, function, lasts):
    """Return what became of each rank, and how many messages it has sent.

    Args:
        world_size: number of ranks.
        function: what they run, with their communicator.
        lasts: by rank, the number of the message that it does not live to send.

    Returns:
        What `function` has returned, or raised; None of a rank that died or was ended.
    """
    aborted = threading.Event()
    world = World(range(world_size), aborted)
    ranks = [Mortal(rank=rank, world_size=world_size, local_rank=rank, world=world) for rank in range(world_size)]
    results = [None] * world_size

    def work(number):
        comm = ranks[number]
        comm.last = lasts.get(number)
        try:
            with use(comm):
                results[number] = function(comm)
            comm._world.leave(comm.rank)
        except (Dead, Aborted):
            pass
        except BaseException as error:
            results[number] = error
            aborted.set()

    workers = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(world_size)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(LIMIT_S)
        assert not worker.is_alive()
    return results, [comm.sent for comm in ranks]
