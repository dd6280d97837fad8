"""A job goes on through faults of all kinds that come at random, to the bits of a run that nobody disturbs.

    python -m pytest -v tests/chaos/test_soak.py                                   # about half a minute
    SOAK_S=3600 python -m pytest -v -m long tests/chaos/test_soak.py               # an hour at each rate of faults

By default the long form takes half an hour at each rate. SOAK_SEED chooses another series of faults.
"""

import itertools
import math
import os
import random
import re
import shutil
import statistics
import time
from pathlib import Path

import pytest

from tests.chaos.jobs import KINDS, Disk, Disturbed, check_reasons

STEP_S, STEPS_PER_EPOCH = 0.1, 8
SHORT_S = 12.0
LONG_S = float(os.environ.get("SOAK_S", "1800"))
SEED = int(os.environ.get("SOAK_SEED", "1"))
ENDLESS = "100000"  # restarts


def read(notes):
    """Return, for each attempt, what its supervisor had in use, and its steps with their times."""
    attempts = []
    for line in notes.splitlines():
        words = line.split()
        if words[0] == "supervisor":
            attempts.append(([int(word) for word in words[1:]], []))
        else:
            attempts[-1][1].append((int(words[0]), float(words[1])))
    return attempts


def check_use(attempts):
    """Check that no supervisor has more files or threads at its last attempt than at its first; return its growth."""
    grown_kb, most = 0, 0
    for _, each in itertools.groupby((use for use, _ in attempts), key=lambda use: use[0]):
        (_, files, threads, kb), *_, last = [*each] * 2
        assert last[1:3] == [files, threads], (files, threads, last)
        grown_kb, most = max(grown_kb, last[3] - kb), max(most, kb)
    return grown_kb, most


@pytest.mark.timeout(300 + 4 * LONG_S)
@pytest.mark.parametrize(
    ("length_s", "between_s", "most", "transport"),
    [
        pytest.param(SHORT_S, 2.0, len(KINDS), "shm", id="short"),
        pytest.param(LONG_S, 60.0, math.inf, "shm", id="long-each-minute", marks=pytest.mark.long),
        pytest.param(LONG_S, 15.0, math.inf, "tcp", id="long-each-quarter", marks=pytest.mark.long),
    ],
)
def test_same_bits_through_faults_of_all_kinds(program, figures, length_s, between_s, most, transport):
    shutil.copy(Path(__file__).with_name("soaked.py"), program.folder)
    epochs = str(round(length_s / STEP_S / STEPS_PER_EPOCH))
    program.limit_s = LONG_S
    alone = program.run("run", "soaked.py", epochs, "0")
    assert alone.exit_code == 0, alone.err
    (program.folder / "steps").unlink()
    command = ["run", "-n", "2", "--launcher", "local", "--transport", transport, "--max-restarts", ENDLESS]
    command += ["soaked.py", epochs, str(STEP_S), "files/run"]
    chance = random.Random(SEED)
    disk = Disk(program.folder / "files")
    begin_s = time.monotonic()
    soak = Disturbed(program, disk, chance, command)
    try:
        while not soak.has_finished:
            assert time.monotonic() - begin_s < 200 + 3 * length_s, soak.err[-20_000:]
            soak.go_on(chance.expovariate(1 / between_s))
            if not soak.has_finished and sum(soak.faults.values()) < most:
                soak.disturb()
    finally:
        soak.leave()
        disk.close()
    took_s = time.monotonic() - begin_s
    (end,) = set(re.findall(r"finished .*", soak.out))
    assert end in alone.out
    restarts = check_reasons(soak.err)
    assert ("checkpoint damaged, trying the one before it" in soak.err) == (soak.damaged > 0)
    attempts = read((program.folder / "steps").read_text())
    grown_kb, kb = check_use(attempts)
    steps = [step for _, each in attempts for step, _ in each]
    gaps_s = [after[1] - before[1] for _, each in attempts for before, after in itertools.pairwise(each)]
    useful_s = max(steps) * statistics.median(gaps_s)
    figures.append(
        f"soak of {took_s:.0f} s, a fault each {between_s:.0f} s ({transport}): {sum(soak.faults.values())} faults "
        f"{soak.faults}, {restarts} restarts, {soak.starts} starts of the command ({soak.given_up} after it gave up), "
        f"{soak.damaged} checkpoints damaged, "
        f"{len(steps) - max(steps)} of {max(steps)} steps taken twice; useful: {useful_s / took_s:.1%} of the time; "
        f"a supervisor of {kb} kB grew by {grown_kb} kB"
    )
