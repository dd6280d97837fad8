"""What remembering steps for a restart costs training: epochs with it and without, in turns, within one `fit`.

    python -m benchmarks.remembering --width 128 --optimizer adam --rounds 20

The model has three layers of `--width`: with 128 it has 0.2 MB, with 2896 100 MB, and with Adam three times as much is
remembered.
"""

import argparse
import os
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

import disttrain as dt
from disttrain import env
from disttrain.last_step import LastStep

_STEPS, _BATCH = 100, 128


class _Turns(dt.callbacks.Callback):
    """Has the steps of every other epoch remembered, and measures all of them.

    Attributes:
        took_s: of each epoch, from the beginning of its first step to the end of its last.
        costs_s: of what was remembered, each.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.took_s: list[float] = []
        self.costs_s: list[float] = []

    def on_train_begin(self) -> None:
        """Come between training and memory."""
        memory = self.model.current_fit.memory
        vote, keep = memory.vote, memory.keep

        def turned() -> float:
            due = vote()
            return due if len(self.took_s) % 2 == 0 else 0.0

        def noted(step: int, tensors: object, values: object, begin_s: float) -> bool:
            is_kept = keep(step, tensors, values, begin_s)  # type: ignore[arg-type]
            self.costs_s.append(time.monotonic() - begin_s)
            return is_kept

        memory.vote, memory.keep = turned, noted  # type: ignore[method-assign]

    def on_train_batch_begin(self, batch: int) -> None:
        """Begin to measure."""
        if batch == 0:
            self._begin_s = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict[str, object]) -> None:
        """End measuring: the last step of an epoch is remembered before this."""
        self.took_s.append(time.perf_counter() - self._begin_s)


def measure(width: int, optimizer: str, rounds: int, steps: int) -> None:
    """Measure and print."""
    last = LastStep.make()
    assert last is not None, "this system has no memfd_create"
    os.environ[env.LAST_STEP] = last.address
    layer = dt.layers.Dense
    model = dt.Sequential(
        [layer(width, activation="relu", input_shape=(width,)), layer(width, activation="relu"), layer(width)]
    )
    model.compile(optimizer, "mse")
    x = np.random.default_rng(0).random((steps * _BATCH, width), np.float32)
    turns = _Turns(steps)
    model.fit(x, x, _BATCH, 2 * (1 + rounds), verbose=0, callbacks=[turns])
    remembering_s, without_s = turns.took_s[2::2], turns.took_s[3::2]
    step_s, cost_s = float(np.median(without_s)) / steps, float(np.median(turns.costs_s))
    ratio = float(np.median(np.divide(remembering_s, without_s)))
    every = steps * (1 + rounds) / len(turns.costs_s)
    found = last.read()
    assert found is not None
    print(f"{optimizer}, {len(found[1]) / 1e6:.1f} MB are remembered, a step takes {step_s * 1e3:.2f} ms")
    print(f"to remember one takes {cost_s * 1e3:.2f} ms (median of {len(turns.costs_s)}): each {every:.1f}th step")
    print(f"an epoch with it takes {ratio:.3f} times as long as without (median of {rounds})")
    last.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--optimizer", default="adam")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=_STEPS, help="of an epoch")
    asked = parser.parse_args()
    measure(asked.width, asked.optimizer, asked.rounds, asked.steps)
