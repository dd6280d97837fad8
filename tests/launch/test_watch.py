"""The watch, on records made up, with a clock made up: whom it names, after how long, and whom it leaves alone."""

import dataclasses

import psutil
import pytest

from disttrain.progress import Phase, Proxy, Record
from launch.watch import BUSY, IDLE, STEPS, Watch, odd_one

TIMEOUT_S = 5.0
STEP_S = 0.5
CALL = (7, "all_reduce", "float32", 4096)


def record(rank, **what):
    known = {"rank": rank, "world_size": 3, "pid": rank, "host": "h", "run": 1, "step": 0, "phase": Phase.SCRIPT}
    return Record(**{**known, "number": 0, "call": CALL, "peer": None, "is_waiting": False, "waits": 0, **what})


def waiting(rank, **what):
    return record(rank, phase=Phase.BUCKET, is_waiting=True, **what)


class Job:
    """Three ranks, whose records and processes a test sets, and a clock that looks every 0.2 s."""

    def __init__(self, timeout_s=TIMEOUT_S):
        self.now_s = 1000.0
        self.records = {rank: record(rank) for rank in range(3)}
        self.states = dict.fromkeys(range(3), psutil.STATUS_RUNNING)
        self.is_busy = True
        self.efforts = 0
        self.watch = Watch(3, timeout_s, state=self.states.__getitem__, effort=self._effort)

    def _effort(self, pid):
        self.efforts += self.is_busy
        return self.efforts

    def look(self, after_s=0.2):
        self.now_s += after_s
        return self.watch.look(self.now_s, self.records)

    def alarm(self, limit_s):
        """Return what is found, and after how long; None if nothing within `limit_s`."""
        begin_s = self.now_s
        while self.now_s - begin_s < limit_s:
            if finding := self.look():
                return finding, self.now_s - begin_s
        return None

    def train(self, steps=5, step_s=STEP_S):
        """Have all take steps."""
        for step in range(1, steps + 1):
            self.records = {rank: record(rank, step=step, phase=Phase.FORWARD) for rank in range(3)}
            assert self.look(step_s) is None
        return steps


def all_wait_but(job, rank, **what):
    job.records = {each: waiting(each, step=5) for each in range(3)}
    job.records[rank] = record(rank, step=5, **what)


IN_STEP = [Phase.DATA, Phase.FORWARD, Phase.BACKWARD, Phase.BUCKET, Phase.METRICS, Phase.OPTIMIZER, Phase.VALIDATION]
ELSEWHERE = [p for p in Phase if p not in IN_STEP and p not in (Phase.JOIN, Phase.LEFT)]


@pytest.mark.parametrize("phase", IN_STEP)
@pytest.mark.parametrize("step_s", [0.1, 1.0])
def test_within_a_step_a_rank_has_ten_median_steps_and_at_least_the_timeout(phase, step_s):
    job = Job()
    job.train(step_s=step_s)
    all_wait_but(job, 1, phase=phase)
    limit_s = max(TIMEOUT_S, STEPS * step_s)
    finding, after_s = job.alarm(100)
    assert (finding.rank, finding.kind, finding.in_step) == (1, "stuck", True)
    assert finding.limit_s == pytest.approx(limit_s)
    assert limit_s <= after_s <= limit_s + 0.5


@pytest.mark.parametrize("phase", ELSEWHERE)
@pytest.mark.parametrize(("is_busy", "times"), [(True, BUSY), (False, IDLE + 1)])
def test_elsewhere_a_rank_has_longer_and_longest_while_it_works(phase, is_busy, times):
    job = Job()
    job.train()
    job.is_busy = is_busy
    all_wait_but(job, 2, phase=phase)
    finding, after_s = job.alarm(1000)
    assert (finding.rank, finding.kind, finding.in_step) == (2, "stuck", False)
    assert after_s == pytest.approx(times * TIMEOUT_S, abs=1)


@pytest.mark.parametrize(("is_busy", "times"), [(True, BUSY), (False, IDLE + 1)])
def test_the_first_steps_may_take_as_long_as_what_is_no_step(is_busy, times):
    job = Job()
    job.is_busy = is_busy
    all_wait_but(job, 0, phase=Phase.FORWARD)
    _, after_s = job.alarm(1000)
    assert after_s == pytest.approx(times * TIMEOUT_S, abs=1)


def test_another_fit_begins_with_first_steps():
    job = Job()
    job.train()
    all_wait_but(job, 0, phase=Phase.FORWARD, run=2)
    assert job.alarm(IDLE * TIMEOUT_S) is None


def test_work_now_and_then_counts_as_work():
    job = Job()
    job.is_busy = False
    all_wait_but(job, 0, phase=Phase.CHECKPOINT)
    for _ in range(10):
        assert job.alarm((IDLE - 1) * TIMEOUT_S) is None
        job.efforts += 1


def test_nobody_is_named_while_nobody_waits():
    job = Job()
    job.train()
    job.records = {rank: record(rank, step=5, phase=Phase.FORWARD) for rank in range(3)}
    assert job.alarm(1000) is None


def test_who_waits_has_waited_that_long_as_well():
    job = Job()
    job.train()
    job.records = {rank: record(rank, step=5, phase=Phase.FORWARD) for rank in range(3)}
    assert job.alarm(20) is None
    job.records[0] = waiting(0, step=5)  # the others are slow, as it was itself
    assert job.alarm(TIMEOUT_S - 0.5) is None
    assert job.alarm(1)[0].kind == "stuck"


@pytest.mark.parametrize("phase", [Phase.FORWARD, Phase.CHECKPOINT])
def test_a_stopped_rank_is_named_wherever_it_is(phase):
    job = Job()
    all_wait_but(job, 1, phase=phase)
    assert job.alarm(20) is None
    job.states[1] = psutil.STATUS_STOPPED
    finding, after_s = job.alarm(100)
    assert (finding.rank, finding.kind) == (1, "stopped")
    assert after_s == pytest.approx(TIMEOUT_S, abs=0.5)


def test_a_rank_that_is_stopped_in_a_collective_is_named_and_not_those_that_wait_with_it():
    job = Job()
    job.records = {rank: waiting(rank) for rank in range(3)}
    job.states[2] = psutil.STATUS_STOPPED
    assert job.alarm(100)[0].rank == 2


def test_a_pause_of_three_seconds_is_no_alarm_however_often():
    job = Job()
    job.train()
    for step in range(6, 26):
        job.records = {rank: waiting(rank, step=step) for rank in (0, 1)}
        job.records[2] = record(2, step=step, phase=Phase.FORWARD)
        job.states[2] = psutil.STATUS_STOPPED
        assert job.alarm(3) is None
        job.states[2] = psutil.STATUS_RUNNING
        job.records[2] = record(2, step=step, phase=Phase.OPTIMIZER)
        assert job.look() is None


def test_time_in_which_the_supervisor_itself_was_stopped_does_not_count():
    job = Job()
    job.train()
    all_wait_but(job, 1, phase=Phase.FORWARD)
    job.look()
    assert job.look(3600) is None


def test_a_call_that_differs_is_named_once_all_wait():
    job = Job()
    job.records = {rank: waiting(rank) for rank in range(3)}
    job.records[2] = waiting(2, call=(6, "barrier", "uint8", 0))
    finding, after_s = job.alarm(100)
    assert (finding.rank, finding.kind) == (2, "differs")
    assert after_s == pytest.approx(TIMEOUT_S, abs=0.5)


def test_while_messages_still_arrive_no_call_differs():
    job = Job()
    for turn in range(100):
        job.records = {
            0: waiting(0, waits=turn),
            1: waiting(1, waits=turn),
            2: waiting(2, call=(8, "barrier", "uint8", 0)),
        }
        assert job.look(1) is None


def test_a_rank_elsewhere_may_be_the_one_that_all_wait_for():
    job = Job()
    job.records = {0: waiting(0), 1: waiting(1, call=(8, "barrier", "uint8", 0))}  # rank 2 is on another host
    finding, after_s = job.alarm(1000)
    assert (finding.rank, finding.kind) == (None, "silence")
    assert after_s == pytest.approx(BUSY * TIMEOUT_S, abs=1)


def test_the_same_call_may_take_long():
    job = Job()
    job.records = {rank: waiting(rank) for rank in range(3)}
    finding, after_s = job.alarm(1000)
    assert finding.kind == "silence"
    assert after_s == pytest.approx(BUSY * TIMEOUT_S, abs=1)


@pytest.mark.parametrize(("state", "limit_s"), [("", 1.0), (psutil.STATUS_SLEEPING, TIMEOUT_S)])
def test_a_rank_that_has_left_is_named_when_all_others_wait(state, limit_s):
    job = Job()
    all_wait_but(job, 0, phase=Phase.LEFT)
    job.states[0] = state
    job.records[1] = record(1, step=5, phase=Phase.CALLBACK)  # it may yet send what is waited for
    assert job.alarm(20) is None
    job.records[1] = waiting(1, step=5)
    finding, after_s = job.alarm(100)
    assert (finding.rank, finding.kind) == (0, "gone")
    assert after_s == pytest.approx(limit_s, abs=0.5)


def test_what_a_rank_sent_before_it_ended_may_still_arrive():
    job = Job()
    all_wait_but(job, 0, phase=Phase.CALLBACK)
    assert job.alarm(20) is None
    job.states[0] = ""
    finding, after_s = job.alarm(100)
    assert (finding.rank, finding.kind) == (0, "gone")
    assert after_s >= 1.0


def test_a_rank_may_work_on_when_the_others_have_left_but_not_be_stuck_in_its_exit():
    job = Job()
    job.is_busy = False
    for rank in (1, 2):
        job.records[rank] = record(rank, phase=Phase.LEFT)
        job.states[rank] = ""
    assert job.alarm(1000) is None
    job.records[0] = record(0, phase=Phase.SHUTDOWN)
    finding, after_s = job.alarm(1000)
    assert (finding.rank, finding.kind) == (0, "stuck")
    assert after_s == pytest.approx((IDLE + 1) * TIMEOUT_S, abs=1)


def test_a_slow_start_of_mpi_on_one_rank_is_no_call_that_differs():
    job = Job()
    job.records = {rank: record(rank, phase=Phase.JOIN, step=None) for rank in range(3)}
    job.records[1] = dataclasses.replace(job.records[1], is_waiting=True, call=(1, "all_gather", "int64", 24))
    assert job.alarm(60) is None


def test_without_a_timeout_nothing_is_found():
    job = Job(timeout_s=0)
    job.train()
    all_wait_but(job, 1, phase=Phase.FORWARD)
    assert job.alarm(2000) is None
    assert job.watch.sights[1].record.phase == Phase.FORWARD  # what a report says of it


@pytest.mark.parametrize(
    ("numbers", "odd"), [([7, 7, 6], 2), ([7, 7, 8], 2), ([6, 7, 7], 0), ([7, 8], 0), ([8, 7], 1), ([7, 7], None)]
)
def test_the_odd_one_is_in_the_minority_or_behind(numbers, odd):
    records = {rank: waiting(rank, call=(number, *CALL[1:])) for rank, number in enumerate(numbers)}
    assert odd_one(records) == odd


def test_of_a_rank_elsewhere_the_watch_asks_no_process_of_this_host():
    """Its proxy runs, and works, whatever the rank does."""
    for proxy, kind, times in [
        (Proxy(pid=1, state=psutil.STATUS_STOPPED), "stopped", 1),
        (Proxy(pid=1, state=psutil.STATUS_SLEEPING, effort="a"), "stuck", IDLE + 1),
    ]:
        job = Job()
        job.train()
        all_wait_but(job, 1, phase=Phase.CALLBACK, proxy=proxy)
        finding, after_s = job.alarm(1000)
        assert (finding.rank, finding.kind) == (1, kind)
        assert after_s == pytest.approx(times * TIMEOUT_S, abs=1)
