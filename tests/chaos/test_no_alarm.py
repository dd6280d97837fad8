"""A rank that is stopped for a moment, on cores that others use as well, is left alone: same bits, and not a word."""

import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.chaos.jobs import workers_of

STEP_S = 0.1
BETWEEN_S = 0.3
MOST_S = 3.0  # of a pause: --hang-timeout is 5 s


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("pauses", [3, pytest.param(200, marks=pytest.mark.long)])
def test_pauses_on_busy_cores_are_no_alarm(program, pauses):
    program.limit_s = 300.0
    shutil.copy(Path(__file__).with_name("soaked.py"), program.folder)
    epochs = str(4 + round(pauses * BETWEEN_S / STEP_S / 8))
    alone = program.run("run", "soaked.py", epochs, "0")
    chance = random.Random(0)
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    process = program.start("run", "-n", "2", "--launcher", "local", "soaked.py", epochs, str(STEP_S))
    try:
        while not (program.folder / "steps").exists() or not workers_of(process):
            time.sleep(0.05)
        for _ in range(pauses):
            time.sleep(BETWEEN_S)
            worker = psutil.Process(chance.choice(workers_of(process)))  # the job is not at its end
            worker.send_signal(signal.SIGSTOP)
            time.sleep(chance.uniform(0, MOST_S))
            worker.send_signal(signal.SIGCONT)
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
    done = program.finish(process)
    assert (done.exit_code, done.err) == (0, "")
    (end,) = re.findall(r"finished .*", done.out)
    assert end in alone.out
