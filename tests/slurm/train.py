"""A model that learns for a while: `train.py DIRECTORY EPOCHS`; rank 0 writes its weights to DIRECTORY.npz."""

import os
import sys
import time

import numpy as np

import disttrain as dt

PAUSE_S = 0.2  # of an epoch, so that there is time to interrupt it

comm = dt.init()
directory, epochs = sys.argv[1:]


class Log(dt.callbacks.Callback):
    def on_train_begin(self, logs=None):
        self.say(f"begins, restart {os.environ.get('SLURM_RESTART_COUNT', 0)}")

    def on_epoch_end(self, epoch, logs=None):
        time.sleep(PAUSE_S)
        self.say(f"epoch {epoch}")

    def say(self, text):
        if comm.rank == 0:
            sys.stdout.write(f"{text}\n")


generator = np.random.default_rng(0)
x = generator.normal(size=(64, 8)).astype("float32")
y = x.sum(axis=1, keepdims=True)
model = dt.Sequential([dt.layers.Dense(4, input_shape=(8,)), dt.layers.Dropout(0.1), dt.layers.Dense(1)])
model.compile(optimizer="adam", loss="mse")
model.fit(
    x, y, epochs=int(epochs), batch_size=16, verbose=0, callbacks=[dt.callbacks.BackupAndRestore(directory), Log()]
)
if comm.rank == 0:
    np.savez(f"{directory}.npz", *(weight.numpy() for weight in model.weights))
sys.stdout.write(f"done on {os.uname().nodename}\n")
