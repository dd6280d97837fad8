"""What a failure leads to: another attempt, on how many workers, or the end; and what is said."""

import re

import pytest

from launch.growth import ASK_S
from launch.job import Job
from launch.report import GROWTH, Ending
from launch.restarts import DOUBT_S, Restarts


def restarts(workers=4, fewest=0, most=0, times=3):
    return Restarts(Job(workers=workers, script="t.py", max_restarts=times, min_workers=fewest, max_workers=most))


def failure(kind="signal 9", step=5, **more):
    return Ending(
        **{"code": 137, "kind": kind, "rank": 1, "workers": 4, "step": step, "why": "was ended by SIGKILL", **more}
    )


def test_says_who_why_where_from_and_how_many_are_left():
    said = restarts().after(failure(), 5)
    assert (
        said
        == "disttrain: restart 1 of 3, because rank 1 of 4 was ended by SIGKILL, in step 5; it goes on from step 5,"
    )


@pytest.mark.parametrize("ending", [Ending(code=0), Ending(code=75, report="asked"), Ending(code=143)])
def test_what_is_no_failure_is_not_started_again(ending):
    policy = restarts()
    assert policy.after(ending, 5) == ""
    assert not policy.goes_on


@pytest.mark.parametrize("kinds", [["exception"] * 3, ["hang"] * 3, ["signal 11"] * 3, ["exit", "signal 9", "hang"]])
@pytest.mark.parametrize(("step", "where"), [(None, "before its first step"), (17, "at step 17")])
def test_three_failures_at_the_same_step_are_not_mended(kinds, step, where):
    policy = restarts(times=9)
    for kind in kinds[:-1]:
        policy.after(failure(kind, step), 5)
        assert policy.goes_on
    said = policy.after(failure(kinds[-1], step, why="failed with ValueError: 3 is too much"), 5)
    assert not policy.goes_on
    assert said.startswith(f"disttrain: no restart: rank 1 of 4 failed 3 times {where}: ValueError: 3 is too much; ")
    assert said.count("\n") == 3  # and a line for each restart before


def test_a_job_that_gets_further_is_started_again():
    policy = restarts(times=99)
    for step in [3, 3, 4, 4, 17, 17, 18, 18, 19]:
        policy.after(failure("exception", step), step)
        assert policy.goes_on


def test_a_failure_further_back_is_no_progress():
    policy = restarts(times=99)
    for step in [17, 5, 17, None]:
        policy.after(failure("exception", step), None)
        assert policy.goes_on
    policy.after(failure("exception", 17), None)
    assert not policy.goes_on


def test_progress_forgets_what_failed_before():
    policy = restarts(times=99)
    for step in [17, 17, 20, 17, 17]:
        policy.after(failure("exception", step), None)
        assert policy.goes_on
    policy.after(failure("exception", 17), None)
    assert not policy.goes_on


def test_the_steps_of_another_fit_are_others():
    policy = restarts(times=99)
    for run, step in [(1, 17), (1, 17), (2, 3), (2, 17), (2, 17), (3, 17)]:
        policy.after(failure("exception", step, run=run), None)
        assert policy.goes_on


def test_where_no_rank_is_seen_the_state_in_memory_shows_progress():
    policy = restarts(times=99)
    for kept in [10, 20, 20, 30, 30, 40, 40]:
        policy.after(failure(step=None, rank=None), kept)
        assert policy.goes_on
    policy.after(failure(step=None, rank=None), 40)
    assert not policy.goes_on


def test_growth_is_no_failure_at_a_step():
    policy = restarts(times=9)
    for ending in (failure(), failure(), Ending(code=75, kind=GROWTH, workers=2)):
        policy.after(ending, 5)
        assert policy.goes_on
    assert policy.after(failure(), 5).startswith("disttrain: no restart: ")


def test_restarts_are_counted():
    policy = restarts(times=2)
    for step in (1, 2):
        policy.after(failure(step=step), None)
        assert policy.goes_on
    assert "no restart is left of 2" in policy.after(failure(step=3), None)
    assert not policy.goes_on


def test_sizes_go_down_to_the_fewest_and_up_to_the_most():
    policy = restarts(workers=3, fewest=2, most=5)
    assert list(policy.sizes) == [3, 2]
    policy.after(failure(step=1), None)
    assert list(policy.sizes) == [5, 4, 3, 2]
    policy.after(failure(step=None, workers=5, has_started=False), None)  # one of five never ran
    assert list(policy.sizes) == [4, 3, 2]
    policy.after(failure(step=2, workers=4), None)
    assert list(policy.sizes) == [5, 4, 3, 2]


def test_growth_is_no_failure_and_asks_for_the_most():
    policy = restarts(workers=4, fewest=1, times=1)
    said = policy.after(Ending(code=75, kind=GROWTH, workers=2), 7)
    assert said == "disttrain: more workers can be started; the job goes on from step 7,"
    assert policy.goes_on
    assert list(policy.sizes) == [4, 3, 2, 1]
    policy.after(failure(), 8)
    assert policy.goes_on


def test_growth_that_fails_goes_back_and_waits_twice_as_long():
    policy = restarts(workers=4, fewest=1, times=1)
    assert policy.wait_s(2) == ASK_S
    for wait_s in (2 * DOUBT_S, 4 * DOUBT_S):
        policy.after(Ending(code=75, kind=GROWTH, workers=2), 7)
        assert policy.wait_s(4) >= ASK_S
        said = policy.after(failure(step=None, has_started=False), 7)
        assert said == "disttrain: not all of 4 workers could be started; the job goes on from step 7,"
        assert policy.goes_on
        assert list(policy.sizes) == [2, 1]
        assert policy.wait_s(2) == wait_s
    policy.after(failure(), 8)
    assert policy.goes_on
    assert policy.wait_s(4) == ASK_S


def test_a_launcher_whose_workers_did_not_come_is_asked_later():
    policy = restarts(workers=4, fewest=1, times=2)
    policy.after(failure(step=None, has_started=False), None)
    assert policy.wait_s(3) == DOUBT_S
    policy.after(failure(step=8), 8)
    assert policy.wait_s(4) == ASK_S


def test_without_bounds_the_number_stays():
    policy = restarts(workers=3)
    policy.after(failure(step=1, workers=3), None)
    assert list(policy.sizes) == [3]
    policy.after(failure(step=None, workers=3, has_started=False), None)
    assert list(policy.sizes) == [3]


FAILS = """
import os, signal, sys, time
attempt = len(os.listdir("attempts"))
open(f"attempts/{attempt}", "w").close()
print("attempt", attempt, "of", os.environ.get("DISTTRAIN_WORLD_SIZE", 1))
"""


def run(program, script, *options):
    (program.folder / "attempts").mkdir()
    program.script(FAILS + script)
    return program.run("run", *options, "--max-restarts", "3", "script.py")


def test_a_script_that_cannot_start_ends_after_three_attempts_with_its_report(program):
    done = run(program, "import no_such_module")
    assert done.exit_code == 1
    assert done.out == "".join(f"attempt {number} of 1\n" for number in range(3))
    assert done.err.count("Traceback (most recent call last)") == 3
    error = "ModuleNotFoundError: No module named 'no_such_module'"
    cause = f"rank 0 of 1 failed with {error}, before its first step"
    assert f"disttrain: no restart: rank 0 of 1 failed 3 times before its first step: {error}; " in done.err
    assert done.err.endswith("".join(f"disttrain: restart {number} was because {cause}\n" for number in (1, 2)))


def test_a_failure_that_does_not_come_again_is_mended_and_told(program):
    done = run(program, "assert attempt, 'only once'")
    assert done.exit_code == 0
    assert "AssertionError: only once" in done.err
    assert (
        "disttrain: restart 1 of 3, because rank 0 of 1 failed with AssertionError: only once, before its first step; "
        "it goes on from what the script has saved, or anew, on 1 worker\n"
    ) in done.err


def test_the_exit_code_is_that_of_the_last_attempt(program):
    done = run(program, "sys.exit(3) if attempt else os.kill(os.getpid(), signal.SIGKILL)")
    assert done.exit_code == 3
    assert "was ended by SIGKILL" in done.err
    assert len(list((program.folder / "attempts").iterdir())) == 3  # and no more


def test_a_job_that_was_asked_to_end_is_not_started_again(program):
    (program.folder / "attempts").mkdir()
    program.script(FAILS + "open('ready', 'w').write('yes'); time.sleep(100)")
    process = program.start("run", "--max-restarts", "3", "script.py")
    program.await_file("ready")
    process.terminate()
    done = program.finish(process)
    assert done.exit_code == 143
    assert "restart" not in done.err


def test_a_job_that_has_saved_its_state_is_not_started_again(program):
    done = run(program, "from disttrain.errors import Preempted; raise Preempted('received SIGTERM')")
    assert done.exit_code == 75
    assert "restart" not in done.err


def test_what_a_script_starts_does_not_reach_the_last_step(program):
    program.script(
        """
import os
from disttrain import env
folder = "/proc/self/fd"
links = [os.path.join(folder, name) for name in os.listdir(folder)]
held = [os.readlink(link) for link in links if os.path.islink(link)]
print("program", bool(env.last_step()), [name for name in held if "memfd:disttrain" in name])
""",
        "other.py",
    )
    program.script(
        """
import os, subprocess, sys
import numpy as np
import disttrain as dt
from disttrain import env

held = [os.readlink(f"/proc/{os.getppid()}/fd/{fd}") for fd in os.listdir(f"/proc/{os.getppid()}/fd")]
print("supervisor holds", sum("memfd:disttrain" in name for name in held))
print("worker knows", bool(env.last_step()))

class Start(dt.callbacks.Callback):
    def on_train_batch_end(self, batch, logs):
        subprocess.run([sys.executable, "other.py"], close_fds=False, check=True)
        if os.fork() == 0:
            print("fork", bool(env.last_step()), flush=True)
            os._exit(0)
        os.wait()

model = dt.Sequential([dt.layers.Dense(1, input_shape=(2,))])
model.compile("sgd", "mse")
model.fit(np.zeros((4, 2)), np.zeros((4, 1)), 4, verbose=0, callbacks=[Start()])
"""
    )
    done = program.run("run", "--max-restarts", "1", "script.py")
    assert done.exit_code == 0, done.err
    assert done.out.splitlines() == ["supervisor holds 2", "worker knows True", "program False []", "fork False"]


def test_fewer_workers_go_on_and_more_as_soon_as_there_is_room(program):
    (program.folder / "mine").mkdir()
    program.script(
        """
import os
from disttrain.errors import LaunchError
from launch import local

def commands(job):
    room = [3, 1, 2][len(os.listdir("attempts"))] if job.workers > 1 else 1
    if job.workers > room:
        raise LaunchError(f"there is room for {room}")
    return local.commands(job)
""",
        "mine/scarce.py",
    )
    (program.folder / "attempts").mkdir()
    program.script(
        """
import os, signal, sys
size, rank = (int(os.environ.get(f"DISTTRAIN_{n}", d)) for n, d in (("WORLD_SIZE", 1), ("RANK", 0)))
if rank == 0:
    open(f"attempts/{size}", "w").close()
    sys.exit(5) if size == 3 else os.kill(os.getpid(), signal.SIGKILL) if size == 1 else None
"""
    )
    done = program.run(
        "run", "-n", "3", "--launcher", "mine.scarce", "--max-restarts", "3", "--min-workers", "1", "script.py"
    )
    assert done.exit_code == 0, done.err
    assert sorted(path.name for path in (program.folder / "attempts").iterdir()) == ["1", "2", "3"]
    assert "disttrain: 3 workers cannot be started: there is room for 1\n" in done.err
    assert re.search("restart 1 of 3, because rank 0 of 3 failed with SystemExit: 5, .* on 1 worker\n", done.err)
    assert re.search("restart 2 of 3, because rank 0 of 1 was ended by SIGKILL, .* on 2 workers\n", done.err)


def test_where_a_worker_never_runs_one_less_is_tried(program):
    (program.folder / "mine").mkdir()
    program.script(
        """
from launch import local
from launch.job import Command

def commands(job):
    broken = [Command(argv=("sh", "-c", "exit 7"))] if job.workers > 1 else []
    return local.commands(job)[len(broken):] + broken
""",
        "mine/broken.py",
    )
    program.script("print('done')")
    options = ("--launcher", "mine.broken", "--max-restarts", "1", "--min-workers", "1")
    done = program.run("run", "-n", "2", *options, "script.py")
    assert done.exit_code == 0, done.err
    assert "a rank ended with exit code 7" in done.err
    assert "on 1 worker\n" in done.err
    assert done.out.endswith("done\n")


def test_bounds_that_exclude_the_number_of_workers_are_refused(program):
    program.script("")
    done = program.run("run", "-n", "2", "--min-workers", "3", "script.py")
    assert done.exit_code == 2
    assert "-n 2 does not lie between --min-workers and --max-workers" in done.err
