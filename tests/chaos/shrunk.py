"""A training on as many ranks as there are: `python shrunk.py HOW STEP`, where HOW is one of

- `die`: rank 1 kills itself before that step, once;
- `die both`: ranks 1 and 2 do;
- `die sharded`: rank 1 does, and the optimizer is sharded;
- `stop`: all ranks stop before that step, with a checkpoint; and go on from it where there is one.
"""

import os
import signal
import sys

import numpy as np

import disttrain as dt


class End(dt.callbacks.Callback):
    def on_train_batch_begin(self, batch):
        if self.model.optimizer.steps != int(sys.argv[-1]):
            return
        if sys.argv[1] == "stop":
            self.model.current_fit.saver.wait()
            if not has_begun:
                sys.exit(3)
        elif launched_as in ((1, 2) if "both" in sys.argv else (1,)) and not os.path.exists(f"died.{launched_as}"):
            open(f"died.{launched_as}", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)


ranks = dt.init()
launched_as = ranks.rank
has_begun = os.path.exists("saved")
ranks.barrier()
random = np.random.default_rng(0)
x = random.normal(size=(75, 64)).astype(np.float32)
model = dt.Sequential(
    [
        dt.layers.Dense(64, "relu", input_shape=(64,)),
        dt.layers.BatchNormalization(),
        dt.layers.Dropout(0.2),
        dt.layers.Dense(3),
    ]
)
distribution = dt.DataParallel(shard_optimizer=True) if "sharded" in sys.argv else None
model.compile("adam", "mse", metrics=["mae"], distribution=distribution)
callbacks = [End(), dt.callbacks.BackupAndRestore("saved", save_freq=1)] if sys.argv[1] == "stop" else [End()]
history = model.fit(x, x[:, :3], 8, 3, validation_split=0.2, verbose=0, callbacks=callbacks)
if ranks.rank == 0:
    print("finished", ranks.world_size, dt.state_digest(model), history.history)
