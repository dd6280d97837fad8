"""Jobs that fail: all ends at once, and the last words say who was the first, where and why."""

import signal
import socket
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.usefixtures("mpi")

LIMIT_S = 2.0  # from an exception to the end of the job: what the design promises

RANK = """
import os, signal, sys, time
rank = int(os.environ.get("PMI_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or 0)
"""
MPI = RANK + "from mpi4py import MPI\n"
FORKED = """
def commands(job):
    from launch.job import Command
    place = lambda rank: {"PMI_RANK": str(rank), "PMI_SIZE": str(job.workers)}
    return [Command(argv=job.worker, env=place(rank)) for rank in range(job.workers)]
"""
# Rank 1 fails when rank 0 has got to where it waits.
WAIT = """
def fail():
    while not os.path.exists("waiting"): time.sleep(0.01)
    time.sleep(0.1)
    with open("failed_s", "w") as file: file.write(str(time.monotonic()))
"""
SLEEP = "open('waiting', 'w').close(); time.sleep(60)\n"
BARRIER = "open('waiting', 'w').close(); MPI.COMM_WORLD.Barrier()\n"
STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SLEEP
WAITS = [(RANK, SLEEP), (MPI, BARRIER), (RANK, STUBBORN)]
NAMES = ["sleep", "barrier", "stubborn"]


def one_fails(head: str, wait: str, failure: str) -> str:
    body = wait.replace("\n", "\n    ")
    return f"{head}{WAIT}if rank == 0:\n    {body}\nelse:\n    fail()\n    {failure}\n"


@pytest.mark.parametrize(("head", "wait"), WAITS, ids=NAMES)
def test_an_exception_on_one_rank_ends_the_job_within_two_seconds(program, head, wait):
    script = program.script(one_fails(head, wait, "raise ValueError('only here')"))
    done = program.run("run", "-n", "2", script)
    assert done.time_s - float(program.await_file("failed_s")) < LIMIT_S
    assert done.exit_code == 1
    host = socket.gethostname()
    lines = done.err.splitlines()
    assert lines[:2] == [
        f"disttrain: rank 1 of 2 failed first, on host {host}, exit code 1:",
        "Traceback (most recent call last):",
    ]
    assert lines[2].startswith(f'  File "{program.folder / script}", line ')
    assert lines[-3:-1] == ["ValueError: only here", f"rank 1 of 2, host {host}"]
    assert lines[-1] == "Meanwhile rank 0: the script's own code, before its first step"
    assert done.err.count("ValueError: only here") == 1
    assert "worker.py" not in done.err
    assert "runpy" not in done.err
    assert done.out == ""


@pytest.mark.parametrize(("head", "wait"), WAITS, ids=NAMES)
def test_an_exit_code_on_one_rank_is_that_of_the_job(program, head, wait):
    done = program.run("run", "-n", "2", program.script(one_fails(head, wait, "sys.exit(3)")))
    assert done.time_s - float(program.await_file("failed_s")) < LIMIT_S
    assert done.exit_code == 3
    assert done.err.splitlines()[0].startswith("disttrain: rank 1 of 2 failed first, on host ")
    assert "SystemExit: 3" in done.err


@pytest.mark.parametrize(("head", "wait"), WAITS[:2], ids=NAMES[:2])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_signal_that_ends_a_worker_is_named(program, head, wait, number):
    failure = f"os.kill(os.getpid(), {int(number)})"
    done = program.run("run", "-n", "2", program.script(one_fails(head, wait, failure)))
    assert done.exit_code == 128 + number
    host = socket.gethostname()
    words = f"disttrain: rank 1 of 2, on host {host}, was ended by signal {int(number)} ({number.name})"
    killed, last, other = done.err.splitlines()[-3:]
    assert killed.startswith(words)
    assert last.startswith("It was at: the script's own code, before its first step; its pid was ")
    assert other == "Meanwhile rank 0: the script's own code, before its first step"
    assert "BAD TERMINATION" not in done.out


def test_the_only_worker_says_why_it_failed(program):
    done = program.run("run", program.script("def f():\n    return 1 / 0\nf()\n"))
    assert done.exit_code == 1
    assert "in f\n    return 1 / 0\n" in done.err
    assert done.err.splitlines()[-2] == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    ("ending", "exit_code", "words"),
    [
        ("sys.exit()", 0, ""),
        ("sys.exit(0)", 0, ""),
        ("sys.exit('no data')", 1, "SystemExit: no data"),
        ("sys.exit(256)", 1, "SystemExit: 256"),
        ("os._exit(0)", 0, ""),
        ("os._exit(7)", 7, "ended with exit code 7, without an exception"),
        ("1 +", 1, "SyntaxError: invalid syntax"),
        ("raise KeyboardInterrupt", 130, ""),
    ],
)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_end_of_a_script_is_that_of_the_job(program, workers, ending, exit_code, words):
    done = program.run("run", "-n", workers, program.script(f"import os, sys\n{ending}\n"))
    assert done.exit_code == exit_code
    assert words in done.err
    assert bool(done.err) == bool(words)


def test_without_a_supervisor_a_worker_prints_its_traceback_itself(program):
    script = program.script("raise ValueError('alone')")
    command = [sys.executable, "-m", "launch.worker", script]
    process = subprocess.Popen(command, cwd=program.folder, env=program.env, stderr=subprocess.PIPE, text=True)
    done = program.finish(process)
    assert done.exit_code == 1
    assert done.err.splitlines()[-2] == "ValueError: alone"


def test_a_rank_that_was_killed_comes_before_those_that_failed_because_of_it(program):
    (program.folder / "mine").mkdir()
    program.script(FORKED, "mine/forked.py")
    lost = "def notice(*_): raise ConnectionError('rank 1 is gone')\nsignal.signal(signal.SIGTERM, notice)\n" + SLEEP
    script = program.script(one_fails(RANK, lost, "os.kill(os.getpid(), signal.SIGKILL)"))
    done = program.run("run", "-n", "2", "--launcher", "mine.forked", script)
    killed, _, then, *_ = done.err.splitlines()
    assert killed.startswith("disttrain: rank 1 of 2, on host")
    assert "signal 9 (SIGKILL)" in killed
    assert then.startswith("disttrain: rank 0 of 2 failed then, on host")
    assert "ConnectionError: rank 1 is gone" in done.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("head", [RANK, MPI], ids=["python", "mpi"])
def test_a_signal_to_the_supervisor_ends_the_job_quietly(program, head, workers, number):
    text = "open(f'ready{rank}', 'w').write('yes'); time.sleep(60)\n"
    process = program.start("run", "-n", workers, program.script(head + text))
    for rank in range(int(workers)):
        program.await_file(f"ready{rank}")
    process.send_signal(number)
    done = program.finish(process)
    assert (done.exit_code, done.out, done.err) == (128 + number, "", "")


def test_workers_may_save_their_work_when_they_are_asked_to_stop(program):
    text = """
def save(*_): print("saved"); sys.exit()
signal.signal(signal.SIGTERM, save)
open(f"ready{rank}", "w").write("yes")
time.sleep(60)
"""
    process = program.start("run", "-n", "2", program.script(MPI + text))
    for rank in (0, 1):
        program.await_file(f"ready{rank}")
    process.terminate()
    done = program.finish(process)
    assert done.exit_code == 128 + signal.SIGTERM
    assert sorted(done.out.splitlines()) == ["[0] saved", "[1] saved"]


def test_a_second_signal_ends_workers_that_will_not_stop(program):
    text = "signal.signal(signal.SIGINT, signal.SIG_IGN); open(f'ready{rank}', 'w').write('yes'); time.sleep(60)\n"
    process = program.start("run", "-n", "2", program.script(RANK + text))
    for rank in (0, 1):
        program.await_file(f"ready{rank}")
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert program.finish(process).exit_code == 130


def test_nothing_is_left_when_the_supervisor_itself_is_killed(program):
    text = "open(f'ready{rank}', 'w').write('yes'); time.sleep(60)\n"
    process = program.start("run", "-n", "2", program.script(RANK + text))
    for rank in (0, 1):
        program.await_file(f"ready{rank}")
    process.kill()
    program.finish(process)
    for folder in (program.folder / "temporary").iterdir():  # what it could not remove any more
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    end_s = time.monotonic() + 30
    while program.left() and time.monotonic() < end_s:
        time.sleep(0.05)


def test_a_reader_that_goes_away_ends_the_job(program):
    process = program.start("run", "-n", "2", program.script("while True: print('y' * 1000)"))
    assert process.stdout is not None
    process.stdout.read(10)
    process.stdout.close()
    process.stdout = None
    assert program.finish(process).exit_code != 0


def test_a_rank_that_was_killed_counts_though_another_had_left_by_itself(program):
    failure = "open('waiting', 'w').close(); os._exit(0)\n"
    script = program.script(one_fails(RANK, failure, "os.kill(os.getpid(), signal.SIGKILL)"))
    (program.folder / "mine").mkdir()
    program.script(FORKED, "mine/forked.py")
    done = program.run("run", "-n", "2", "--launcher", "mine.forked", script)
    assert done.exit_code == 128 + signal.SIGKILL


def test_a_launcher_that_fails_before_any_rank_is_told_apart_from_ranks(program, mpi):
    done = program.run("run", "-n", "2", "--launcher", "mpirun", "-o", "mpiexec=--no-such-option", program.script(""))
    assert done.exit_code not in (0, 124)
    assert f"no rank has started; what starts them ended with exit code {done.exit_code}" in done.err
    assert "no-such-option" in done.err
