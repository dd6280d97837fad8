"""The progress of `fit`, `evaluate` and `predict`: a bar on a terminal, a line of values anywhere."""

import time
from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track

from disttrain.data import Batches
from disttrain.training.callbacks import Callback, Logs

_REFRESH_S = 0.1

T = TypeVar("T")


class ProgressBar(Callback):
    """Shows on rank 0 how far an epoch is, samples per second, and the values so far.

    Args:
        batches: of the training data.
        epochs: in all.
        verbose: 0: nothing; 1 or "auto": bar and lines; 2: lines.
    """

    def __init__(self, batches: Batches, epochs: int, *, verbose: str | int) -> None:
        self.batches = batches
        self.epochs = epochs
        self.verbose = verbose
        self.console = Console(highlight=False, soft_wrap=True)

    def on_epoch_begin(self, epoch: int) -> None:
        """Begin a bar, also where one was left because a rank was lost: another one may be rank 0 now."""
        self.on_train_end()
        self.console.quiet = self.verbose == 0 or self.batches.rank > 0
        self.bar = self.console.is_terminal and self.verbose in (1, "auto") and not self.console.quiet
        self.label = f"Epoch {epoch + 1}/{self.epochs}"
        self.started = self.shown = time.perf_counter()
        self.samples = 0
        self.trained_s = 0.0
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
            console=self.console, auto_refresh=False, transient=True, disable=not self.bar,
        )  # fmt: skip
        self.task = self.progress.add_task(self.label, total=self.batches.steps_per_epoch, values="")
        self.progress.start()

    def on_train_batch_end(self, batch: int, logs: Logs) -> None:
        """Move the bar, at most ten times a second."""
        now = time.perf_counter()
        self.trained_s = now - self.started
        left = len(self.batches.x) - batch * self.batches.batch_size
        self.samples += min(self.batches.batch_size, left)
        if self.bar and now - self.shown > _REFRESH_S:
            self.shown = now
            self.progress.update(self.task, completed=batch + 1, values=_values(logs))
            self.progress.refresh()

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        """Replace the bar by a line."""
        self.progress.stop()
        rate = f"{self.samples / self.trained_s:,.0f} samples/s" if self.trained_s else ""
        self.console.print(f"{self.label}  {rate}  {_values(logs)}")

    def on_train_end(self) -> None:
        """Leave no bar behind."""
        if hasattr(self, "progress"):
            self.progress.stop()


def shown(batches: Iterable[T], label: str, total: int, *, rank: int, verbose: str | int) -> Iterable[T]:
    """Return `batches`; on rank 0's terminal a bar shows how many have been taken, if `verbose` is 1 or "auto"."""
    if rank > 0 or verbose not in (1, "auto"):
        return batches
    console = Console()
    return track(batches, label, total, console=console, transient=True) if console.is_terminal else batches


def show_values(logs: Logs, label: str, *, rank: int, verbose: str | int) -> None:
    """Print a line of values on rank 0, unless `verbose` is 0."""
    if rank == 0 and verbose != 0:
        Console(highlight=False, soft_wrap=True).print(f"{label}  {_values(logs)}")


def _values(logs: Logs) -> str:
    return "  ".join(f"{name} {_number(value)}" for name, value in logs.items())


def _number(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return "[" + " ".join(_number(v) for v in value) + "]"
    return f"{value:.4f}" if abs(value) >= 1e-3 or value == 0 else f"{value:.3e}"
