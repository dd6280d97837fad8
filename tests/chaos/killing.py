"""Kills processes that save: `python killing.py TRIALS SEED`, and prints what was found, or fails.

A child saves again and again, half of them as two ranks of a training do, beside it; the parent kills it at a random
moment. Each number is reported when its save has returned: none that was reported may be lost, and each checkpoint that
is listed is whole. Children are forked: a trial takes some tens of milliseconds.
"""

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from disttrain import checkpoint
from disttrain.checkpoint import Keep
from disttrain.comm import threads
from disttrain.errors import CheckpointError
from disttrain.training.saving import Saver

SIZE = 50_000


def tensors(number):
    return {"model": {"x": np.full(SIZE, number)}, "optimizer": {"y": np.full(SIZE, number, np.float32)}}


def save_alone(folder, first, report):
    for number in range(first, first + 1000):
        checkpoint.save(folder, tensors(number), number)
        report(number)


def save_together(folder, first, report):
    def work(comm):
        saver = Saver(comm)
        for number in range(first, first + 1000):
            saver.save(folder, tensors(number), number, keep=Keep())  # waits for the one before
            if comm.rank == 0 and number > first:
                report(number - 1)

    threads.run(2, work)


def trial(chance, folder, first):
    """Return the newest number that was reported, and the newest that is there."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        chance.choice([save_alone, save_together])(folder, first, lambda n: os.write(writer, n.to_bytes(8, "little")))
        os._exit(0)
    os.close(writer)
    time.sleep(chance.uniform(0, 0.15))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with open(reader, "rb") as pipe:
        said = pipe.read()
    reported = int.from_bytes(said[-8:], "little")
    for place in Path(folder).glob("checkpoint-*"):
        number = checkpoint.load(place).values
        for arrays in checkpoint.load(place).tensors.values():
            for array in arrays.values():
                assert array.shape == (SIZE,), place
                assert (array == number).all(), f"{place} is mixed"
    try:
        return reported, checkpoint.load(folder).values
    except CheckpointError:
        return reported, 0


def main(trials, seed):
    chance, newest, kept = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(trials):
            before = newest
            reported, newest = trial(chance, folder, newest + 1)
            assert newest >= max(reported, before), f"trial {number}: {reported} was reported, {newest} is there"
            kept += newest > before
        checkpoint.save(folder, tensors(0), 0)
        left = [path.name for path in Path(folder).iterdir() if path.name.startswith((".tmp", ".seen"))]
        assert not [name for name in left if name.startswith(".tmp")], left
    print(f"{trials} kills: nothing lost, nothing mixed; {kept} times something was saved before the kill")


main(int(sys.argv[1]), int(sys.argv[2]))
