"""A training that is killed: `python restarted.py EPOCHS [BACKUP]`.

Each rank notes its pid and each of its steps with the time, one line each, in `steps.RANK`; a line is written when the
step is done. At its end it prints the digest of its weights and optimizer, and the losses of all epochs.
"""

import os
import sys
import time

import numpy as np

import disttrain as dt


class Slow(dt.callbacks.Callback):
    def __init__(self):
        self.samples = 0  # a state of its own, that goes on

    def on_train_batch_end(self, batch, logs):
        self.samples += 8
        time.sleep(0.1)  # a fiftieth of it is what a step may cost to be remembered: 2 ms
        note(f"{self.model.optimizer.steps} {time.monotonic()}")

    def state(self):
        return {"samples": self.samples}

    def restore(self, state):
        self.samples = state["samples"]


def note(text):
    os.write(notes, f"{text}\n".encode())


ranks = dt.init()
notes = os.open(f"steps.{ranks.rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
note(f"pid {os.getpid()} of {ranks.world_size}")
random = np.random.default_rng(0)
x = random.normal(size=(75, 64))
layers = [
    dt.layers.Dense(64, "relu", input_shape=(64,)),
    dt.layers.BatchNormalization(),
    dt.layers.Dropout(0.2),
    dt.layers.Dense(3),
]
model = dt.Sequential(layers)
model.compile(dt.optimizers.Adam(0.01, gradient_accumulation_steps=2), "mse", metrics=["mae"])
slow = Slow()
backup = [dt.callbacks.BackupAndRestore(sys.argv[2], save_freq=7)] if len(sys.argv) > 2 else []
history = model.fit(
    x, x[:, :3], 8, int(sys.argv[1]), validation_split=0.2, verbose=0, callbacks=[slow, *backup], reproducible=True
)
if ranks.rank == 0:
    print("finished", dt.state_digest(model), slow.samples, history.history)
