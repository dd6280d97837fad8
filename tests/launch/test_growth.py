"""When a launcher is asked whether it could start more workers, and for how many."""

import pytest

from disttrain.errors import LaunchError
from launch import growth
from launch.growth import ASK_S, Growth
from launch.job import Job

WAIT_S = 20.0


class Room:
    """A launcher that has room for so many."""

    def __init__(self, workers):
        self.workers = workers
        self.asked = []

    def commands(self, job):
        self.asked.append(job.workers)
        if job.workers > self.workers:
            raise LaunchError("no room")


@pytest.fixture
def room(monkeypatch):
    room = Room(2)
    monkeypatch.setattr(growth, "commands", room.commands)
    return room


def look(grows, now_s, workers):
    """Look twice, with the answer in between."""
    grows.look(now_s, workers)
    if grows._question is not None:
        grows._question.join()
    return grows.look(now_s, workers)


def test_asks_now_and_then_for_the_most_first_until_there_is_room(room):
    grows = Growth(Job(workers=4, script="t.py"), 4, WAIT_S)
    assert not look(grows, 0.0, 2)
    assert not look(grows, WAIT_S - 1, 2)
    assert room.asked == []
    assert not look(grows, WAIT_S, 2)
    assert room.asked == [4, 3]
    assert not look(grows, WAIT_S + ASK_S - 1, 2)
    room.workers = 3
    assert room.asked == [4, 3]
    assert look(grows, WAIT_S + ASK_S, 2)
    assert room.asked == [4, 3, 4, 3]


def test_a_loss_begins_the_wait_anew(room):
    grows = Growth(Job(workers=3, script="t.py"), 3, WAIT_S)
    room.workers = 3
    assert not look(grows, 0.0, 3)
    assert not look(grows, WAIT_S, 3)
    assert not look(grows, 100.0, 2)
    assert not look(grows, 100.0 + WAIT_S - 1, 2)
    assert room.asked == []
    assert look(grows, 100.0 + WAIT_S, 2)


def test_who_is_told_to_hurry_asks_at_once_for_all_that_the_job_may_have(room):
    grows = Growth(Job(workers=2, max_workers=4, script="t.py"), 2, WAIT_S)
    room.workers = 4
    assert not look(grows, WAIT_S, 2)
    assert not look(grows, 2 * WAIT_S, 2)
    grows.hurry()
    assert look(grows, 2 * WAIT_S, 2)
    assert room.asked == [4]
