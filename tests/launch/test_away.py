"""A rank on another host, started by an MPI or srun, is heard of and watched as one beside `disttrain run`."""

import re
import shutil
import socket

import pytest

pytestmark = pytest.mark.timeout(120)

RUN = ("run", "-n", "2", "--launcher", "tests.launch.away")
TRAIN = """
import os, signal, sys, time
import numpy as np
import disttrain as dt

class Doing(dt.layers.Dense):
    calls = 0

    def call(self, x):
        Doing.calls += 1
        time.sleep(0.01)
        if dt.init().rank == 1 and Doing.calls > 60:
            deed(sys.argv[1])
        return super().call(x)

def deed(what):
    if what == "raise": raise ValueError("on purpose")
    if what == "exit": os._exit(7)
    if what == "kill": os.kill(os.getpid(), signal.SIGKILL)
    if what == "stop": os.kill(os.getpid(), signal.SIGSTOP)
    while True: pass

model = dt.Sequential([Doing(1, input_shape=(8,))])
model.compile(optimizer="sgd", loss="mse", static=False)
x = np.ones((400, 8), "float32")
model.fit(x, x[:, :1], batch_size=20, epochs=100, verbose=0)
"""
ENDS = {
    "raise": (1, ["rank 1 of 2 failed first, on host {host}, exit code 1:\nTraceback", "ValueError: on purpose"]),
    "exit": (7, ["rank 1 of 2, on host {host}, ended with exit code 7", "It was at: step 59, forward; its pid was "]),
    "kill": (137, ["was ended by signal 9 (SIGKILL)", "It was at: step 59, forward; its pid was "]),
    "stop": (124, ["rank 1 of 2 is stopped by a signal, on host {host}, pid ", "T (stopped)", "step 59, forward\n"]),
    "loop": (124, ["rank 1 of 2 is stuck, on host {host}, pid ", "    while True: pass\n", "step 59, forward, at "]),
}


def test_what_it_writes_is_labelled_and_it_succeeds(program):
    script = program.script("import sys\nprint('out')\nprint('err', file=sys.stderr)\n")
    done = program.run(*RUN, script)
    assert done.exit_code == 0, done.err
    assert sorted(done.out.splitlines()) == ["[0] out", "[1] out"]
    assert sorted(done.err.splitlines()) == ["[0] err", "[1] err"]


@pytest.mark.parametrize("deed", ENDS)
def test_whatever_ends_it_is_named_with_its_place_and_what_the_other_did(program, deed):
    done = program.run(*RUN, "--hang-timeout", "2", program.script(TRAIN), deed)
    code, words = ENDS[deed]
    assert done.exit_code == code, done.err
    for each in words:
        assert each.format(host=socket.gethostname()) in done.err
    # who is told at once may be seen before it waits
    doing = (
        r"step 59, bucket 0; waits in all_reduce \d+ \(float32, \d+ bytes\)"
        if deed in ("stop", "loop")
        else "step 5[89]"
    )
    assert re.search(f"Meanwhile rank 0: {doing}", done.err)
    # On one host `disttrain run` kills those as well who would remove it after that.
    for folder in (program.folder / "temporary").iterdir() if deed == "stop" else ():
        shutil.rmtree(folder)


def test_one_that_leaves_without_a_word_is_missed_by_the_others(program):
    text = "import os\nimport disttrain as dt\ncomm = dt.init()\ncomm.rank and os._exit(0)\ncomm.barrier()\n"
    done = program.run(*RUN, program.script(text))
    assert done.exit_code == 1
    assert "rank 1 has ended without a word" in done.err


def test_one_with_another_secret_is_refused_and_says_that_nobody_watches_it(program):
    done = program.run(*RUN, "-o", "secret=another secret of a job", program.script("print('runs')\n"))
    assert done.exit_code == 0, done.err
    assert sorted(done.out.splitlines()) == ["[0] runs", "runs"]
    assert re.search(r"rank 1 is not watched: disttrain run at 127\.0\.0\.1:\d+ has refused rank 1", done.err)
