"""Saves on a disk of 1 MB until it is full, and on one that cannot be written to: `python full.py FOLDER`.

It is run in a namespace of its own, in which FOLDER is that disk: see test_checkpoint_disk.py.
"""

import os
import subprocess
import sys

import numpy as np

from disttrain import checkpoint
from disttrain.errors import CheckpointError


def refused(number):
    try:
        checkpoint.save(run, {"model": {"x": np.full(30_000, number)}}, number)
    except CheckpointError as error:
        return str(error)
    raise AssertionError("it was saved")


folder = sys.argv[1]
run = f"{folder}/run"
checkpoint.save(run, {"model": {"x": np.full(30_000, 1)}}, 1)  # 240 kB
with open(f"{folder}/other", "wb") as file:
    file.write(bytes(700_000))
for _ in range(3):
    print(refused(2))
    assert checkpoint.load(run).values == 1
    assert sorted(os.listdir(run)) == [".lock", "checkpoint-000001"]
os.unlink(f"{folder}/other")
checkpoint.save(run, {"model": {"x": np.full(30_000, 3)}}, 3)
assert checkpoint.load(run).values == 3
subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
print(refused(4))
assert checkpoint.load(run).values == 3
subprocess.run(["mount", "-o", "remount,rw", folder], check=True)
checkpoint.save(run, {"model": {"x": np.full(30_000, 5)}}, 5)
assert checkpoint.load(run).values == 5
print("all of it")
