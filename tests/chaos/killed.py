"""A reproducible training that saves after each step: `python killed.py EPOCHS [RANK STEPS DELAY_S]`.

When that rank has taken so many steps, a thread of it waits for so long, and kills its process, wherever that then is.
"""

import os
import signal
import sys
import threading
import time

import numpy as np

import disttrain as dt


class Kill(dt.callbacks.Callback):
    taken = 0

    def on_train_batch_begin(self, batch):
        self.taken += 1
        if sys.argv[2:4] == [str(ranks.rank), str(self.taken - 1)]:
            threading.Timer(float(sys.argv[4]), os.kill, (os.getpid(), signal.SIGKILL)).start()

    def on_train_batch_end(self, batch, logs):
        time.sleep(0.005)


ranks = dt.init()
x = np.random.default_rng(0).normal(size=(103, 12))
model = dt.Sequential(
    [
        dt.layers.Dense(16, activation="relu", input_shape=(12,)),
        dt.layers.BatchNormalization(),
        dt.layers.Dropout(0.2),
        dt.layers.Dense(3),
    ]
)
model.compile("adam", "mse", ["mae"])
history = model.fit(
    x, x[:, :3], 10, int(sys.argv[1]), verbose=0, reproducible=True,
    callbacks=[Kill(), dt.callbacks.BackupAndRestore("saved", save_freq=1)],
)  # fmt: skip
print("finished", dt.state_digest(model), history.history["loss"][-1])
