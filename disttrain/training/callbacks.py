"""Callbacks: what happens between steps and epochs, in Keras's vocabulary.

Every rank runs every callback with the same values, so that all decide alike.
"""

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from disttrain.errors import ConfigError, unknown_name
from disttrain.observe import log

if TYPE_CHECKING:
    from disttrain.training.model import Model

Logs = dict[str, Any]

_UPWARD = ("acc", "accuracy", "precision", "recall", "f1_score")
_DOWNWARD = ("loss", "error", "mse", "mae", "crossentropy")


class Callback:
    """Base of all callbacks: override what you need.

    Attributes:
        model: the model that is trained; ``model.stop_training = True`` ends it after this epoch.
    """

    model: "Model"

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


class ModelCheckpoint(_Monitor):
    """Saves the model after epochs or steps, as `Model.save` does.

    Args:
        filepath: a directory, or an fsspec address; the newest two stay.
        monitor: name of the value that says what is best.
        save_best_only: whether to save only when it became better.
        mode: ``"min"``, ``"max"``, or ``"auto"``, by the name.
        save_freq: ``"epoch"``, or a number of steps.
    """

    def __init__(
        self,
        filepath: str | os.PathLike[str],
        monitor: str = "val_loss",
        *,
        save_best_only: bool = False,
        mode: str = "auto",
        save_freq: str | int = "epoch",
    ) -> None:
        super().__init__(monitor, mode, 0)
        self.filepath = filepath
        self.save_best_only = save_best_only
        self.save_freq = _frequency(save_freq)

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        """Save, if this is the time."""
        if self.save_freq is None:
            self._save(logs)

    def on_train_batch_end(self, batch: int, logs: Logs) -> None:
        """Save, if this is the time."""
        if self.save_freq is not None and self.model.optimizer.iterations % self.save_freq == 0:
            self._save(logs)

    def _save(self, logs: Logs) -> None:
        if self.save_best_only:
            value = self._value(logs)
            if not self._is_better(value, self.best):
                return
            self.best = value
        self.model.save(self.filepath)

    def state(self) -> dict[str, Any]:
        """Return the best value."""
        return {"best": self.best}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with the best value."""
        self.best = state["best"]


class BackupAndRestore(Callback):
    """Saves the state of training, and goes on from it when `fit` is called again after an interruption.

    A resumed run ends with the same bits as one that was not interrupted.

    Args:
        backup_dir: a directory, or an fsspec address; the newest two checkpoints stay.
        save_freq: ``"epoch"``, or a number of steps.
    """

    def __init__(self, backup_dir: str | os.PathLike[str], save_freq: str | int = "epoch") -> None:
        self.backup_dir = backup_dir
        self.save_freq = _frequency(save_freq)

    def on_train_begin(self) -> None:
        """Go on from the newest whole checkpoint, if there is one."""
        self.model.current_fit.resume(self.backup_dir)

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        """Save, if this is the time."""
        if self.save_freq is None:
            self.model.current_fit.save(self.backup_dir)

    def on_train_batch_end(self, batch: int, logs: Logs) -> None:
        """Save, if this is the time."""
        if self.save_freq is not None and self.model.optimizer.iterations % self.save_freq == 0:
            self.model.current_fit.save(self.backup_dir)


def _frequency(save_freq: str | int) -> int | None:
    """Return a number of steps, or None for epochs."""
    if save_freq == "epoch":
        return None
    if not isinstance(save_freq, int) or save_freq < 1:
        raise ConfigError(f"save_freq is 'epoch' or a number of steps of at least 1, not {save_freq!r}")
    return save_freq
