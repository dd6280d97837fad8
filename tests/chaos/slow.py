"""A training in which one rank becomes slow: `python slow.py KIND RANK STEPS`.

In each of STEPS steps every rank works for 20 ms. From step 10 on RANK takes 200 ms: for its data, in a layer, or to
send messages; "stopped" is stopped for half of the time, and so takes twice as long; "none" goes on as before.
"""

import itertools
import os
import signal
import sys
import time

import numpy as np

import disttrain as dt
from disttrain.data.loader import Batches

FROM_STEP, USUAL_S, MORE_S, PERIOD_S = 10, 0.02, 0.18, 0.1
MESSAGES = 3  # that a rank sends in a step, so that each may take a third of it


class Work(dt.layers.Layer):
    def call(self, x):
        work(USUAL_S)
        if is_slow("compute"):
            work(MORE_S)
        return x


class Stop(dt.callbacks.Callback):
    def on_train_batch_end(self, batch, logs):
        if is_slow("stopped") and not stopping:
            stopping.append(os.fork())
            if not stopping[0]:
                stop_and_go()


def work(seconds):
    """Take so long without a core, but longer where it is stopped meanwhile: short sleeps do not make up for it."""
    for _ in range(round(seconds / 0.002)):
        time.sleep(0.002)


def stop_and_go():
    parent = os.getppid()
    while os.getppid() == parent:
        os.kill(parent, signal.SIGSTOP)
        time.sleep(PERIOD_S / 2)
        os.kill(parent, signal.SIGCONT)
        time.sleep(PERIOD_S / 2)
    os._exit(0)


def is_slow(what):
    return what == kind and ranks.rank == slow and model.optimizer.steps >= FROM_STEP


def epoch(batches, *place):
    for batch in batches_of(batches, *place):
        if is_slow("data"):
            work(MORE_S)
        yield batch


def isend(*message):
    if is_slow("network"):
        work(MORE_S / MESSAGES)
    return isend_of(*message)


kind, slow, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
ranks = dt.init()
stopping: list[int] = []
batches_of, Batches.epoch = Batches.epoch, epoch
isend_of, ranks._isend = ranks._isend, isend
x = np.random.default_rng(0).random((8 * steps, 4))
model = dt.Sequential([Work(), dt.layers.Dense(1)])
model.build((None, 4))
model.compile("sgd", "mse", static=False)
model.fit(x, x[:, :1], 8, verbose=0, callbacks=[Stop()])
for process in stopping:
    os.kill(process, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGCONT)
    os.waitpid(process, 0)
print("trained", *itertools.islice(sys.argv, 1, 2))
