"""A training that saves its state: `python preempted.py EPOCHS`. It leaves its pids in files `pid.RANK` once it trains.

At its end it prints the digest of its weights, and each rank the steps that it has taken.
"""

import os
import sys
import time

import numpy as np

import disttrain as dt


class Slow(dt.callbacks.Callback):
    def on_train_begin(self):
        self.first = None

    def on_train_batch_begin(self, batch):
        if self.first is None:
            self.first = self.model.optimizer.iterations
            with open(f"pid.{ranks.rank}.tmp", "w") as file:
                file.write(str(os.getpid()))
            os.replace(f"pid.{ranks.rank}.tmp", f"pid.{ranks.rank}")

    def on_train_batch_end(self, batch, logs):
        time.sleep(0.01)


ranks = dt.init()
x = np.random.default_rng(0).normal(size=(40, 64))
model = dt.Sequential([dt.layers.Dense(64, input_shape=(64,)), dt.layers.Dropout(0.2), dt.layers.Dense(3)])
model.compile("adam", "mse")
slow = Slow()
try:
    model.fit(
        x, x[:, :3], 4, int(sys.argv[1]), verbose=0,
        callbacks=[slow, dt.callbacks.BackupAndRestore("saved", save_freq=7)],
    )  # fmt: skip
    print("finished", dt.state_digest(model))
finally:
    print(f"steps {slow.first} {model.optimizer.iterations}", flush=True)
