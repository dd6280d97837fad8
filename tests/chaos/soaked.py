"""A training of any length: `python soaked.py EPOCHS STEP_S [BACKUP]`, where steps take STEP_S seconds at least.

Rank 0 notes in `steps` what its supervisor has in use, once all ranks have joined, and when each of its steps is done.
"""

import os
import sys
import time

import numpy as np
import psutil

import disttrain as dt
from disttrain import env


class Slow(dt.callbacks.Callback):
    def on_train_batch_end(self, batch, logs):
        time.sleep(float(sys.argv[2]))
        note(f"{self.model.optimizer.steps} {time.monotonic()}")


def note(text):
    if ranks.rank == 0:
        os.write(notes, f"{text}\n".encode())


def used():
    """Return what the supervisor, which holds the memory of the last step, has in use."""
    supervisor = psutil.Process(int(env.last_step().partition(":")[0]))
    rss_kb = supervisor.memory_info().rss >> 10
    return f"{supervisor.pid} {supervisor.num_fds()} {supervisor.num_threads()} {rss_kb}"


ranks = dt.init()
notes = os.open("steps", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
if env.last_step():
    note(f"supervisor {used()}")
x = np.random.default_rng(0).normal(size=(64, 64))
layers = [dt.layers.Dense(64, "relu", input_shape=(64,)), dt.layers.BatchNormalization(), dt.layers.Dropout(0.2)]
model = dt.Sequential([*layers, dt.layers.Dense(3)])
model.compile(dt.optimizers.Adam(0.001), "mse")
callbacks = [Slow(), *(dt.callbacks.BackupAndRestore(path, save_freq=10) for path in sys.argv[3:])]
history = model.fit(x, x[:, :3], 8, int(sys.argv[1]), verbose=0, callbacks=callbacks, reproducible=True)
if ranks.rank == 0:
    print("finished", dt.state_digest(model), history.history["loss"][-1])
