"""Callbacks: what happens between steps and epochs, in Keras's vocabulary.

Every rank runs every callback with the same values, so that all decide alike.
"""

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from disttrain import comm
from disttrain.checkpoint import Keep, Metric
from disttrain.checkpoint.storage import Claim, storage
from disttrain.errors import ConfigError, Preempted, unknown_name
from disttrain.observe import log
from disttrain.training.agreement import together
from disttrain.training.ending import EndOfTime

if TYPE_CHECKING:
    from disttrain.training.model import Model

Logs = dict[str, Any]

_UPWARD = ("acc", "accuracy", "precision", "recall", "f1_score")
_DOWNWARD = ("loss", "error", "mse", "mae", "crossentropy")


class Callback:
    """Base of all callbacks: override what you need.

    Attributes:
        model: the model that is trained; ``model.stop_training = True`` ends it after this epoch.
        votes: what `vote` returned before the last step, summed over the ranks.
    """

    model: "Model"
    votes: Sequence[float] = ()

    def on_train_begin(self) -> None:
        """Called before the first step."""

    def on_train_end(self) -> None:
        """Called after the last step."""

    def on_epoch_begin(self, epoch: int) -> None:
        """Called before an epoch, counted from 0."""

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        """Called after an epoch and its validation with all values of it."""

    def on_train_batch_begin(self, batch: int) -> None:
        """Called before a step, counted from 0 in each epoch."""

    def on_train_batch_end(self, batch: int, logs: Logs) -> None:
        """Called after a step, with the values of the epoch so far."""

    def vote(self) -> Sequence[float]:
        """Return numbers that this rank alone knows, as many on all; called before each step, whose sums carry them."""
        return ()

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs to know: JSON values, and arrays."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned in the run that is resumed."""


class History(Callback):
    """What `fit` returns.

    Attributes:
        epoch: the epochs, counted from 0.
        history: for each value its course over the epochs.
    """

    def __init__(self) -> None:
        self.epoch: list[int] = []
        self.history: dict[str, list[Any]] = {}

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        """Add the epoch's values."""
        self.epoch.append(epoch)
        for name, value in logs.items():
            self.history.setdefault(name, []).append(value)

    def state(self) -> dict[str, Any]:
        """Return the course so far."""
        history = {name: [np.asarray(v).tolist() for v in values] for name, values in self.history.items()}
        return {"epoch": list(self.epoch), "history": history}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with the course of the run that is resumed."""
        self.epoch = list(state["epoch"])
        self.history = {
            name: [np.array(value) if isinstance(value, list) else value for value in values]
            for name, values in state["history"].items()
        }


class _Monitor(Callback):
    """Base of callbacks that follow one value and know when it became better."""

    def __init__(self, monitor: str, mode: str, min_delta: float) -> None:
        if mode not in ("auto", "max", "min"):
            raise unknown_name("mode", mode, ("auto", "max", "min"))
        self.monitor = monitor
        self.mode = mode
        self.min_delta = abs(min_delta)
        self._maximize = mode == "max" or (mode == "auto" and monitor.endswith(_UPWARD))
        self.best: float | None = None

    def _value(self, logs: Logs) -> float:
        if self.monitor not in logs:
            hint = "; give fit() validation_data" if self.monitor.startswith("val_") else ""
            raise ConfigError(
                f"{type(self).__name__} follows {self.monitor!r}, which is not there: {', '.join(logs)}{hint}"
            )
        if self.mode == "auto" and not self.monitor.endswith(_UPWARD + _DOWNWARD):
            raise ConfigError(
                f"{type(self).__name__} cannot tell whether more or less {self.monitor!r} is better; say mode='max' "
                "or mode='min'"
            )
        return float(logs[self.monitor])

    def _metric(self, logs: Logs, *, is_needed: bool) -> Metric | None:
        """Return the value for a checkpoint to be told by, None where it is neither needed nor there."""
        if not is_needed and self.monitor not in logs:
            return None
        if not is_needed and self.mode == "auto" and not self.monitor.endswith(_UPWARD + _DOWNWARD):
            return None
        return Metric(name=self.monitor, value=self._value(logs), mode="max" if self._maximize else "min")

    def _is_better(self, value: float, than: float | None) -> bool:
        if than is None:
            return True
        return value > than + self.min_delta if self._maximize else value < than - self.min_delta


class EarlyStopping(_Monitor):
    """Ends training when a value has not become better for `patience` epochs.

    Args:
        monitor: name of the value.
        min_delta: by how much better counts.
        patience: how many epochs without it are allowed.
        verbose: 1 says why training ended.
        mode: ``"min"``, ``"max"``, or ``"auto"``, by the name.
        baseline: a value that must be passed for any epoch to count as better.
        restore_best_weights: whether to end with the weights of the best epoch.
        start_from_epoch: epochs before this one are not looked at.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        min_delta: float = 0,
        patience: int = 0,
        verbose: int = 0,
        mode: str = "auto",
        baseline: float | None = None,
        *,
        restore_best_weights: bool = False,
        start_from_epoch: int = 0,
    ) -> None:
        super().__init__(monitor, mode, min_delta)
        self.patience = patience
        self.verbose = verbose
        self.baseline = baseline
        self.restore_best_weights = restore_best_weights
        self.start_from_epoch = start_from_epoch
        self.wait = 0
        self.stopped_epoch = 0
        self.best_epoch = 0
        self._best_weights: dict[str, Any] = {}

    def on_train_begin(self) -> None:
        """Forget an earlier training."""
        self.wait, self.stopped_epoch, self.best_epoch = 0, 0, 0
        self.best, self._best_weights = None, {}

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        """Look at the value."""
        value = self._value(logs)
        if epoch < self.start_from_epoch:
            return
        self.wait += 1
        if self._is_better(value, self.best):
            self.best, self.best_epoch = value, epoch
            if self.restore_best_weights:
                self._best_weights = {w.name: w.data.copy() for w in self.model.weights}
            if self._is_better(value, self.baseline):
                self.wait = 0
        elif self.wait >= self.patience and epoch > 0:
            self.stopped_epoch = epoch
            self.model.stop_training = True

    def on_train_end(self) -> None:
        """Put the best weights back, if asked to."""
        if self._best_weights:
            for weight in self.model.weights:
                weight.data[...] = self._best_weights[weight.name]
        if self.stopped_epoch and self.verbose:
            log.warning(
                "early stopping after epoch %d: the best %s, %s, was in epoch %d",
                self.stopped_epoch + 1, self.monitor, self.best, self.best_epoch + 1,
            )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """Return the count, the best value and its weights."""
        kept = {f"best/{name}": array for name, array in self._best_weights.items()}
        return {"wait": self.wait, "best": self.best, "best_epoch": self.best_epoch, **kept}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self.wait, self.best, self.best_epoch = state["wait"], state["best"], state["best_epoch"]
        self._best_weights = {n.removeprefix("best/"): a for n, a in state.items() if n.startswith("best/")}


class _Due:
    """When to save: after epochs or a number of steps, and a number of seconds after the last time."""

    def __init__(self, save_freq: str | int, seconds: float | None) -> None:
        if save_freq != "epoch" and (isinstance(save_freq, bool) or not isinstance(save_freq, int) or save_freq < 1):
            raise ConfigError(f"save_freq is 'epoch' or a number of steps of at least 1, not {save_freq!r}")
        if seconds is not None and not seconds > 0:
            raise ConfigError(f"seconds is a number above 0, or None, not {seconds!r}")
        self._steps = None if save_freq == "epoch" else int(save_freq)
        self._seconds = seconds
        self._last_s = time.monotonic()

    @property
    def by_epochs(self) -> bool:
        return self._steps is None

    def vote(self) -> float:
        """Return 1 on rank 0 when its clock says that it is time; the ranks' clocks differ."""
        is_time = self._seconds is not None and time.monotonic() - self._last_s >= self._seconds
        return float(is_time and comm.current().rank == 0)

    def after_step(self, iterations: int, vote: float) -> bool:
        """Return whether to save after a step; `vote` is the sum over the ranks."""
        return vote > 0 or (self._steps is not None and iterations % self._steps == 0)

    def saved(self) -> None:
        """Begin to count the seconds anew."""
        self._last_s = time.monotonic()


class ModelCheckpoint(_Monitor):
    """Saves the model after epochs, steps or seconds, as `Model.save` does, but beside the training.

    A checkpoint is on the disk when the next one is begun, and when `fit` ends.

    Args:
        filepath: a directory, or an fsspec address.
        monitor: name of the value that says what is best.
        save_best_only: whether to save only when it became better.
        mode: ``"min"``, ``"max"``, or ``"auto"``, by the name.
        save_freq: ``"epoch"``, or a number of steps.
        seconds: save as well when so many have passed since the last time.
        keep: which checkpoints stay: as many of the newest, or a Keep.
    """

    def __init__(
        self,
        filepath: str | os.PathLike[str],
        monitor: str = "val_loss",
        *,
        save_best_only: bool = False,
        mode: str = "auto",
        save_freq: str | int = "epoch",
        seconds: float | None = None,
        keep: int | Keep = 2,
    ) -> None:
        super().__init__(monitor, mode, 0)
        self.filepath = filepath
        self.save_best_only = save_best_only
        self.keep = keep if isinstance(keep, Keep) else Keep(last=keep)
        self._due = _Due(save_freq, seconds)

    def vote(self) -> Sequence[float]:
        """Return whether it is time, by the clock."""
        return (self._due.vote(),)

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        """Save, if this is the time."""
        if self._due.by_epochs:
            self._save(logs)

    def on_train_batch_end(self, batch: int, logs: Logs) -> None:
        """Save, if this is the time."""
        if self._due.after_step(self.model.optimizer.steps, *self.votes):
            self._save(logs)

    def _save(self, logs: Logs) -> None:
        metric = self._metric(logs, is_needed=self.save_best_only or self.keep.best > 0)
        if self.save_best_only and metric is not None:
            if not self._is_better(metric.value, self.best):
                return
            self.best = metric.value
        self.model.current_fit.saver.save(self.filepath, *self.model.saved_parts(), keep=self.keep, metric=metric)
        self._due.saved()

    def state(self) -> dict[str, Any]:
        """Return the best value."""
        return {"best": self.best}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with the best value."""
        self.best = state["best"]


class BackupAndRestore(_Monitor):
    """Saves the state of training, and goes on from it when `fit` is called again after an interruption.

    A resumed run ends with the same bits as one that was not interrupted, on as many ranks as it was begun with. The
    state is written beside the training, and saved once more when `fit` ends.

    When a rank receives SIGTERM or SIGUSR1, or the time limit of the job is near, all ranks finish the step, save
    together, and raise `disttrain.errors.Preempted`, with which a program ends with the exit code 75. Only a `fit` in
    the main thread hears signals.

    The directory belongs to the run while it goes on: another that begins there is refused.

    Args:
        backup_dir: a directory, or an fsspec address.
        save_freq: ``"epoch"``, or a number of steps.
        seconds: save as well when so many have passed since the last time.
        keep: which checkpoints stay: as many of the newest, or a Keep.
        monitor: name of the value that says which are best; needed for ``Keep(best=...)``.
        mode: ``"min"``, ``"max"``, or ``"auto"``, by the name.
        time_limit_s: seconds from the beginning of `fit` to the end of the job; by default what Slurm says, if it does.
    """

    def __init__(
        self,
        backup_dir: str | os.PathLike[str],
        save_freq: str | int = "epoch",
        *,
        seconds: float | None = None,
        keep: int | Keep = 2,
        monitor: str = "loss",
        mode: str = "auto",
        time_limit_s: float | None = None,
    ) -> None:
        super().__init__(monitor, mode, 0)
        self.backup_dir = backup_dir
        self.keep = keep if isinstance(keep, Keep) else Keep(last=keep)
        self.time_limit_s = time_limit_s
        self._due = _Due(save_freq, seconds)
        self._claim: Claim | None = None
        self._end = EndOfTime(None)
        self._is_claimed = False  # as far as all ranks know
        self._saved_at = -1

    def on_train_begin(self) -> None:
        """Go on from the newest whole checkpoint, if there is one."""
        fit = self.model.current_fit
        self._claim, self._is_claimed = None, False
        self._claim_if_need_be()
        self._end = fit.held.enter_context(EndOfTime(self.time_limit_s))
        fit.resume(self.backup_dir)
        self._saved_at = self.model.optimizer.steps

    def vote(self) -> Sequence[float]:
        """Return whether it is time by the clock, and whether training is to end."""
        return self._due.vote(), float(self._end.is_near())

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        """Save, if this is the time."""
        if self._due.by_epochs:
            self._save(logs)

    def on_train_batch_end(self, batch: int, logs: Logs) -> None:
        """Save, if this is the time; and end training, if a rank was asked to."""
        timer, end = self.votes
        if end or self._due.after_step(self.model.optimizer.steps, timer):
            self._save(logs)
        if end:
            self.model.current_fit.saver.wait()
            reasons = comm.current().all_gather_json(self._end.reason())
            reason = next(f"rank {rank}: {text}" for rank, text in enumerate(reasons) if text)
            log.warning("training ends after step %d, saved in %s: %s", self._saved_at, self.backup_dir, reason)
            raise Preempted(reason)

    def on_train_end(self) -> None:
        """Save what was done since the last time."""
        if self._saved_at != self.model.optimizer.steps:
            self._save({})

    def restore(self, state: dict[str, Any]) -> None:
        """Claim the directory anew before the next save, and save at the end: a rank that did so may be lost."""
        self._is_claimed, self._saved_at = False, -1

    def _claim_if_need_be(self) -> None:
        ranks = comm.current()
        if not self._is_claimed:
            is_due = ranks.rank == 0 and self._claim is None
            claim = together(ranks, lambda: storage(self.backup_dir).claim() if is_due else None)
            if claim is not None:
                self._claim = claim
                self.model.current_fit.held.callback(claim.release)
            self._is_claimed = True

    def _save(self, logs: Logs) -> None:
        fit = self.model.current_fit
        self._claim_if_need_be()
        metric = self._metric(logs, is_needed=self.keep.best > 0 and bool(logs))
        fit.save(self.backup_dir, keep=self.keep, metric=metric, claim=self._claim)
        self._saved_at = self.model.optimizer.steps
        self._end.took_s = max(self._end.took_s, fit.saver.took_s)
        self._due.saved()
