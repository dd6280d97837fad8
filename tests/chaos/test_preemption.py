"""A job that is asked to end saves its state within the grace period, and goes on without having lost a step."""

import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from disttrain.errors import PREEMPTED

pytestmark = [pytest.mark.usefixtures("mpi"), pytest.mark.timeout(180)]

EPOCHS, STEPS_PER_EPOCH = 12, 10
GRACE_S = 5.0
MARGIN_S = 5.0  # for a machine that is busy
TRIALS = 50


@pytest.fixture(scope="session")
def undisturbed():
    """Return the digest of a run that nobody disturbs, by the number of ranks; filled by the tests."""
    return {}


def finish(program, ranks):
    program.limit_s = 120.0
    shutil.copy(Path(__file__).with_name("preempted.py"), program.folder)
    return program.run("run", "-n", str(ranks), "preempted.py", str(EPOCHS))


def digest(done):
    assert done.exit_code == 0, done.err
    (found,) = set(re.findall(r"finished (\w{64})", done.out))
    return found


def trial(number):
    """Return the parameters of a trial: chosen by its number alone, so that it can be repeated."""
    chance = random.Random(number)
    ranks = chance.choice([1, 2, 3])
    target = chance.choice(["supervisor", "rank"])
    number_of = chance.choice([signal.SIGTERM, signal.SIGUSR1])
    return ranks, target, chance.randrange(ranks), number_of, chance.uniform(0, 0.8)


@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=() if n in (1, 3) else pytest.mark.long) for n in range(TRIALS)]
)
def test_nothing_is_lost(program, undisturbed, number):
    ranks, target, rank, sent, delay_s = trial(number)
    if ranks not in undisturbed:
        undisturbed[ranks] = digest(finish(program, ranks))
        shutil.rmtree(program.folder / "saved")
        for path in program.folder.glob("pid.*"):
            path.unlink()
    shutil.copy(Path(__file__).with_name("preempted.py"), program.folder)
    process = program.start("run", "-n", str(ranks), "preempted.py", str(EPOCHS))
    pids = [int(program.await_file(f"pid.{r}")) for r in range(ranks)]
    time.sleep(delay_s)
    begin_s = time.monotonic()
    if target == "supervisor":
        process.send_signal(sent)
    else:
        os.kill(pids[rank], sent)
    done = program.finish(process)
    assert done.exit_code == PREEMPTED, done.err
    assert done.time_s - begin_s < GRACE_S + MARGIN_S
    assert re.search(rf"ends with exit code {PREEMPTED}: rank \d: received {sent.name}", done.err), done.err
    ends = {int(last) for _, last in re.findall(r"steps (\w+) (\d+)", done.out)}
    assert len(ends) <= 1, done.out  # ranks that are ended by the first to leave say nothing
    again = finish(program, ranks)
    assert digest(again) == undisturbed[ranks]
    begun = {int(first) for first, _ in re.findall(r"steps (\w+) (\d+)", again.out)}
    if ends:
        assert begun == ends  # not a step is done twice


@pytest.mark.parametrize(
    "numbers",
    [
        pytest.param([signal.SIGHUP], id="HUP", marks=pytest.mark.long),
        pytest.param([signal.SIGINT], id="INT", marks=pytest.mark.long),
        pytest.param([signal.SIGINT] * 2, id="INT twice"),
        pytest.param([signal.SIGTERM] * 2, id="TERM twice", marks=pytest.mark.long),
        pytest.param([signal.SIGTERM, signal.SIGUSR1] * 2 + [signal.SIGTERM], id="five"),
    ],
)
@pytest.mark.parametrize("number", [0, *(pytest.param(n, marks=pytest.mark.long) for n in range(1, 10))])
def test_other_signals_leave_what_a_run_can_go_on_from(program, undisturbed, numbers, number):
    """They need not save; a second one ends the job, in the middle of a save too: within the time of exit handlers."""
    chance = random.Random(number)
    if 2 not in undisturbed:
        undisturbed[2] = digest(finish(program, 2))
        shutil.rmtree(program.folder / "saved")
        for path in program.folder.glob("pid.*"):
            path.unlink()
    shutil.copy(Path(__file__).with_name("preempted.py"), program.folder)
    process = program.start("run", "-n", "2", "preempted.py", str(EPOCHS))
    for rank in range(2):
        program.await_file(f"pid.{rank}")
    time.sleep(chance.uniform(0, 0.5))
    for sent in numbers:
        process.send_signal(sent)
        time.sleep(0.01)
    asked_s = time.monotonic()
    done = program.finish(process)
    assert done.exit_code in (PREEMPTED, *(128 + sent for sent in numbers)), done
    assert done.time_s - asked_s < 2.0 + MARGIN_S
    assert digest(finish(program, 2)) == undisturbed[2]
