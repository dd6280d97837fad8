"""What saving costs training: 20 steps of a model of 100 MB with a checkpoint in their middle, and without, in turns.

    python -m benchmarks.checkpoint --optimizer adam --rounds 5 [FOLDER]

Both are calls of `fit` in one process. Waiting for the disk at their end is not counted: it is what the next steps
would hide. With SGD a checkpoint has 100 MB, with Adam 300.
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


class _Run(dt.callbacks.Callback):
    """Measures a run, and saves in its middle.

    Attributes:
        took_s: from the beginning of the first step to the end of the last.
        stall_s: how long training stood still for the checkpoint.
    """

    def __init__(self, folder: str | None) -> None:
        self.folder = folder
        self.took_s = self.stall_s = 0.0

    def on_train_batch_begin(self, batch: int) -> None:
        """Begin to measure."""
        if batch == 0:
            self._begin_s = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict[str, object]) -> None:
        """Save, or end measuring."""
        if batch == _STEPS // 2 and self.folder is not None:
            saver = self.model.current_fit.saver
            saver.save(self.folder, *self.model.saved_parts(), keep=Keep())
            (self.stall_s,) = saver.stalls_s
        self.took_s = time.perf_counter() - self._begin_s


def measure(optimizer: str, rounds: int, folder: str) -> None:
    """Measure and print."""
    layer = dt.layers.Dense
    model = dt.Sequential(
        [layer(_WIDTH, activation="relu", input_shape=(_WIDTH,)), layer(_WIDTH, activation="relu"), layer(_WIDTH)]
    )
    model.compile(optimizer, "mse")
    x = np.random.default_rng(0).random((_STEPS * _BATCH, _WIDTH), np.float32)
    runs: list[tuple[_Run, _Run]] = []
    for _ in range(1 + rounds):
        runs.append((_Run(folder), _Run(None)))
        for run in runs[-1]:
            model.fit(x, x, _BATCH, 1, verbose=0, callbacks=[run])
    first, *timed = runs  # in the first, memory is touched for the first time
    total_s = float(np.median([without.took_s for _, without in timed]))
    stall_s = float(np.median([saving.stall_s for saving, _ in timed]))
    ratio = float(np.median([saving.took_s / without.took_s for saving, without in timed]))
    print(f"{optimizer}, {_STEPS} steps, median of {rounds}: {total_s:.3f} s, {total_s / _STEPS * 1e3:.1f} ms a step")
    print(f"training stands still for a checkpoint: {stall_s * 1e3:.1f} ms, {stall_s / total_s:.2%} of {_STEPS} steps")
    print(f"the first time: {first[0].stall_s * 1e3:.1f} ms")
    print(f"{_STEPS} steps with a checkpoint take {ratio:.3f} times as long as without")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="of the checkpoints; by default a temporary one, removed at the end")
    parser.add_argument("--optimizer", default="sgd")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        measure(asked.optimizer, asked.rounds, asked.folder or temporary)
