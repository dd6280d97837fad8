"""Stacks of processes that do not answer: asked for, read, and told as a traceback."""

import os
import subprocess
import sys
import time

import disttrain
from launch import stacks

WRITTEN = """\
Thread 0x00007f0000000001 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 327 in wait

Current thread 0x00007f0000000002 (most recent call first):
  File "{library}/comm/mpi.py", line 150 in wait
  File "/home/me/train.py", line 8 in step
  File "/home/me/train.py", line 12 in <module>
  File "{worker}", line 90 in _run
  File "<frozen runpy>", line 88 in _run_code
"""
LIBRARY = os.path.dirname(disttrain.__file__)
WORKER = os.path.join(os.path.dirname(stacks.__file__), "worker.py")


def test_the_stack_is_that_of_the_script_outermost_first(tmp_path):
    path = tmp_path / "stacks.0"
    path.write_text(WRITTEN.format(library=LIBRARY, worker=WORKER))
    frames = stacks.read(path)
    script = "/home/me/train.py"
    assert frames == [(script, 12, "<module>"), (script, 8, "step"), (f"{LIBRARY}/comm/mpi.py", 150, "wait")]
    assert stacks.place(frames) == "/home/me/train.py:8"
    text = stacks.as_traceback(frames)
    assert text.startswith('Stack (most recent call last):\n  File "/home/me/train.py", line 12, in <module>\n')


def test_without_a_stack_there_is_no_place(tmp_path):
    assert stacks.read(tmp_path / "stacks.0") == []
    assert stacks.place([]) == ""
    assert stacks.place([(f"{LIBRARY}/comm/mpi.py", 150, "wait")]) == ""


def test_an_endless_loop_in_c_that_holds_the_interpreter_tells_its_stack(tmp_path):
    path = tmp_path / "stacks.0"
    text = f"""
import faulthandler, re, signal
faulthandler.register(signal.SIGUSR2, file=open({str(path)!r}, "w"))
print(flush=True)
re.match("(a?){{60}}a{{60}}", "a" * 60)
"""
    with subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline()
            time.sleep(0.1)
            stacks.ask({path: process.pid})
            assert process.poll() is None
        finally:
            process.kill()
    assert stacks.read(path)[0][1:] == (5, "<module>")


def test_a_process_that_is_not_prepared_is_left_alone(tmp_path):
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            stacks.ask({tmp_path / "stacks.0": process.pid})
            assert process.poll() is None
        finally:
            process.kill()
