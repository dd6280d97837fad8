"""What saving costs training: 20 steps of a model of 100 MB with a checkpoint in their middle, and without, in turns.

    python -m benchmarks.checkpoint --optimizer adam --rounds 5 [FOLDER]

Both are epochs of one call of `fit`. Waiting for the disk at their end is not counted: it is what the next steps would
hide. With SGD a checkpoint has 100 MB, with Adam 300.
"""

import argparse
import os
import tempfile
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

import disttrain as dt
from disttrain.checkpoint import Keep

_STEPS, _BATCH, _WIDTH = 20, 128, 2896  # 3 x 2896 x 2896 weights: 100 MB


class _Turns(dt.callbacks.Callback):
    """Saves in the middle of every other epoch, and measures all of them.

    Attributes:
        took_s: of each epoch, from the beginning of its first step to the end of its last.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.took_s: list[float] = []

    def on_train_batch_begin(self, batch: int) -> None:
        """Begin to measure."""
        if batch == 0:
            self._begin_s = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict[str, object]) -> None:
        """Save, or end measuring."""
        saver = self.model.current_fit.saver
        if batch == _STEPS // 2 and len(self.took_s) % 2 == 0:
            saver.save(self.folder, *self.model.saved_parts(), keep=Keep())
        if batch == _STEPS - 1:
            self.took_s.append(time.perf_counter() - self._begin_s)
            saver.wait()


def measure(optimizer: str, rounds: int, folder: str) -> None:
    """Measure and print."""
    layer = dt.layers.Dense
    model = dt.Sequential(
        [layer(_WIDTH, activation="relu", input_shape=(_WIDTH,)), layer(_WIDTH, activation="relu"), layer(_WIDTH)]
    )
    model.compile(optimizer, "mse")
    x = np.random.default_rng(0).random((_STEPS * _BATCH, _WIDTH), np.float32)
    turns = _Turns(folder)
    model.fit(x, x, _BATCH, 2 * (1 + rounds), verbose=0, callbacks=[turns])
    first_s, *stalls_s = model.current_fit.saver.stalls_s  # in the first, memory is touched for the first time
    saving_s, without_s = turns.took_s[2::2], turns.took_s[3::2]
    total_s, stall_s = float(np.median(without_s)), float(np.median(stalls_s))
    ratio = float(np.median(np.divide(saving_s, without_s)))
    print(f"{optimizer}, {_STEPS} steps, median of {rounds}: {total_s:.3f} s, {total_s / _STEPS * 1e3:.1f} ms a step")
    print(f"training stands still for a checkpoint: {stall_s * 1e3:.1f} ms, {stall_s / total_s:.2%} of {_STEPS} steps")
    print(f"the first time: {first_s * 1e3:.1f} ms")
    print(f"{_STEPS} steps with a checkpoint take {ratio:.3f} times as long as without")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="of the checkpoints; by default a temporary one, removed at the end")
    parser.add_argument("--optimizer", default="sgd")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        measure(asked.optimizer, asked.rounds, asked.folder or temporary)
