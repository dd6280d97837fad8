"""A training in which one rank fails: `python training.py FAILURE PHASE SECONDS`, by callbacks and patches of its own.

It leaves the time of the failure, by time.monotonic, in the file `failed_s`.
"""

import atexit
import os
import signal
import subprocess
import sys
import time

import numpy as np

import disttrain as dt
from disttrain import data_parallel, env
from disttrain.checkpoint.pieces import Snapshot
from disttrain.data import Batches
from disttrain.optimizers import SGD

FAILURE, PHASE, SECONDS = sys.argv[1], sys.argv[2], float(sys.argv[3])
RANK = env.place().rank
STEP = 0 if FAILURE == "nothing" or PHASE in ("checkpoint", "first step") else 40  # by then there is a median
CULPRIT = 0 if PHASE == "checkpoint" else 1  # rank 0 writes checkpoints
STEP_S = 0.02


def fail():
    with open("failed_s.tmp", "w") as file:
        file.write(str(time.monotonic()))
    os.replace("failed_s.tmp", "failed_s")
    FAILURES[FAILURE]()


def loop():
    while True:
        pass


def pause():
    resume = f"sleep {SECONDS}; kill -CONT {os.getpid()}"
    subprocess.Popen(["/bin/sh", "-c", resume])
    os.kill(os.getpid(), signal.SIGSTOP)


FAILURES = {
    "exception": lambda: {}["only here"],
    "exit 0": lambda: sys.exit(0),
    "exit 3": lambda: sys.exit(3),
    "_exit 0": lambda: os._exit(0),
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGSTOP": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "endless loop": loop,
    "sleep": lambda: time.sleep(1e6),
    "extra call": lambda: dt.init().all_gather(np.ones(3)),
    "missing call": lambda: None,  # the others make one
    "long": lambda: time.sleep(SECONDS),
    "pause": pause,
}
done = set()


def here(phase, *, when=True):
    """Fail, once, if `phase` is the one to fail in; all but the culprit make the call that it misses."""
    if phase != PHASE or not when or phase in done:
        return
    done.add(phase)
    if RANK == CULPRIT:
        fail()
    elif FAILURE == "missing call":
        dt.init().all_gather(np.ones(3))


def patched(owner, name, phase, at_step, *, after=False):
    """Have the method `name` of `owner` fail at a step."""
    method = getattr(owner, name)

    def replacement(*args, **kwargs):
        if not after:
            here(phase, when=at_step())
        result = method(*args, **kwargs)
        if after:
            here(phase, when=at_step())
        return result

    setattr(owner, name, replacement)


class Layer(dt.Layer):
    def call(self, x, training=False):
        here("forward" if training else "evaluation", when=len(x) > 0 and (is_time() or not training))
        here("first step", when=training)
        return x


class Steps(dt.callbacks.Callback):
    def on_train_batch_end(self, batch, logs):
        time.sleep(STEP_S)
        here("callback", when=is_time())


def is_time():
    return model.optimizer.iterations >= STEP and model.optimizer.iterations > 0


here("start")
data_parallel.GradientSum.__init__.__kwdefaults__["bucket_bytes"] = 1  # a bucket for each parameter
ranks = dt.init()
atexit.register(here, "shutdown")
model = dt.Sequential([dt.layers.Dense(8, input_shape=(4,)), Layer(), dt.layers.Dense(3)])
model.compile(SGD(), "mse", static=False)
patched(Batches, "batch", "data", is_time)
patched(SGD, "apply", "optimizer", is_time)
patched(data_parallel.GradientSum, "deliver", "bucket", is_time, after=True)
patched(Snapshot, "take", "checkpoint", lambda: True)  # what a thread does then, others do not wait for
x = np.random.default_rng(0).normal(size=(100 if PHASE == "shutdown" else 1000, 4))
callbacks = [Steps()]
if PHASE == "checkpoint":
    callbacks.append(dt.callbacks.ModelCheckpoint("saved", save_freq=1))
history = model.fit(
    x, x[:, :3], batch_size=20, epochs=1, verbose=0, callbacks=callbacks, validation_data=(x[:60], x[:60, :3])
)
print("trained")
