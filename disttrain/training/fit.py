"""Fit: one call of `Model.fit`, with its place in the epochs, which can be saved and gone on from."""

import contextlib
import functools
import itertools
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from disttrain import env, progress
from disttrain.backend import seed
from disttrain.checkpoint import Checkpoint, Keep, Metric, Tensors
from disttrain.checkpoint.storage import Claim
from disttrain.data import Batch, Batches, Ledger, Order
from disttrain.data.ledger import checksum, total
from disttrain.errors import CheckpointError, DeadRankError, Preempted
from disttrain.observe import log
from disttrain.progress import Phase
from disttrain.training.agreement import together
from disttrain.training.callbacks import BackupAndRestore, Callback, ModelCheckpoint
from disttrain.training.circumstances import circumstances, differences, one_blas_thread
from disttrain.training.remembering import Memory
from disttrain.training.replica import Replica
from disttrain.training.saving import Saver, read, shared, understood
from disttrain.training.sharded import Sums
from disttrain.training.surviving import survive

if TYPE_CHECKING:
    from disttrain.training.model import Model

_ENDS = ("on_train_batch_end", "on_epoch_end")  # after which a callback has another state


class Fit:
    """The training loop, and where it stands.

    Args:
        model: compiled and built.
        replica: of the model.
        batches: of the training data.
        validation: of the validation data, if any.
        callbacks: in the order in which they run; those that save the state of training run last.
        epochs: where to stop, counted from 0.
        initial_epoch: where to begin.

    Attributes:
        epoch: that runs, counted from 0.
        step: number of steps taken in it.
        sums: what these steps added up.
        ledger: of the samples that were read.
        saver: writes checkpoints while training goes on.
        memory: of the last step, with the supervisor.
        held: what is to be released when training ends, however it does.
    """

    def __init__(
        self,
        model: "Model",
        replica: Replica,
        batches: Batches,
        *,
        validation: Batches | None,
        callbacks: Sequence[Callback],
        epochs: int,
        initial_epoch: int,
    ) -> None:
        self.model = model
        self.replica = replica
        self.batches = batches
        self.validation = validation
        if replica.witness is not None:  # the run begins anew, and leaves nothing behind
            callbacks = [each for each in callbacks if not isinstance(each, BackupAndRestore | ModelCheckpoint)]
        self.callbacks = sorted(callbacks, key=lambda callback: isinstance(callback, BackupAndRestore))
        self.epochs = epochs
        self.epoch = initial_epoch
        self.step = 0
        self.sums: Sums | None = None
        order = Order(samples=len(batches.x), batch_size=batches.batch_size, shuffle=batches.shuffle, seed=batches.seed)
        self.ledger = Ledger(order, env.ledger_key())
        self.saver = Saver(replica.comm)
        self.memory = Memory(replica.comm)
        self._is_to_remember = self._is_to_end = False  # the step that is taken; training with it
        self._whole_at: int | None = None  # how many steps there were when all of this was last as after them
        self.held = contextlib.ExitStack()
        self._first_rate = self._rate()

    def run(self) -> None:
        """Train to the end, or until a callback stops it; what was saved is on the disk when this returns or raises."""
        self.model.stop_training = False
        for callback in self.callbacks:
            callback.model = self.model
        progress.begin_run()
        with progress.phase(Phase.FIT), self.held:
            self.held.callback(self.memory.close)
            if self.replica.shards is not None:
                self.held.enter_context(one_blas_thread())
            try:
                self._call("on_train_begin")
                self._go_on()
                self._whole_at = self.replica.optimizer.steps
                while self.epoch < self.epochs and not self.model.stop_training:
                    try:
                        self._run_epoch()
                    except DeadRankError as loss:
                        survive(self, loss)
                self._call("on_train_end")
                self.saver.wait()  # for all ranks: so none leaves while others may need it to shrink
            except BaseException as error:
                self.saver.leave(error)
                raise
            self.replica.check()
            self.replica.share_state()

    def _run_epoch(self) -> None:
        epoch = self.epoch
        self._call("on_epoch_begin", epoch)
        for step in self.replica.steps:
            step.training.check_again()
        progress.at(Phase.DATA)
        for batch in self.batches.epoch(epoch, self.step):
            self._call("on_train_batch_begin", self.step)
            sums = self._train(batch)
            self.sums = sums if self.sums is None else self.sums + sums
            self.step += 1
            self._whole_at = self.replica.optimizer.steps
            logs = self.replica.logs(self.sums)
            self._call("on_train_batch_end", self.step - 1, logs)
            self._remember()
            progress.at(Phase.DATA)
        assert self.sums is not None
        self.replica.update.settle()
        logs = self.replica.logs(self.sums)
        if self.validation is not None:
            validated = self.replica.evaluate(self.validation.epoch(0), Phase.VALIDATION)
            logs.update({f"val_{name}": value for name, value in validated.items()})
        self.epoch, self.step, self.sums = epoch + 1, 0, None
        self._call("on_epoch_end", epoch, logs)

    def _train(self, batch: Batch) -> Sums:
        """Take a step; with its sums travels what each rank alone knows: its callbacks' votes, and failures to save."""
        votes = [callback.vote() for callback in self.callbacks]
        read = [float(len(batch.samples)), float(checksum(batch.samples))]
        own_votes = [float(self.saver.has_failed), self.memory.vote(), *read, *itertools.chain(*votes)]
        sums = self.replica.train(batch, own_votes)
        failures, remembers, count, its, *summed = self.replica.votes
        self._is_to_remember, self._is_to_end = remembers > 0, remembers > 1
        self.ledger.note(self.epoch, self.step, int(count), total(its), self.replica.comm.world_size)
        if failures:
            self.saver.wait()  # which raises, on all ranks
        for callback, own in zip(self.callbacks, votes, strict=True):
            callback.votes, summed = summed[: len(own)], summed[len(own) :]
        return sums

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        keep: Keep | None = None,
        metric: Metric | None = None,
        claim: Claim | None = None,
    ) -> None:
        """Begin to save the state of training under `path`; as `Saver.save`."""
        self.replica.share_state()
        tensors, values = self.state()
        values = {"model": self.model.description(), **values}
        self.saver.save(path, tensors, values, keep=keep or Keep(), metric=metric, claim=claim)

    def state(self) -> tuple[Tensors, dict[str, Any]]:
        """Return what a run that goes on needs, once that is the same on all ranks: tensors, and values."""
        states = [callback.state() for callback in self.callbacks]
        arrays = {f"{i}/{k}": v for i, state in enumerate(states) for k, v in state.items() if _is_array(v)}
        training = {
            "epoch": self.epoch,
            "step": self.step,
            "ledger": self.ledger.state(),
            "sums": None if self.sums is None else self.sums.tolist(),
            "shapes": self.replica.shapes,
            **self.replica.progress(),
            "learning_rate": [self._first_rate, self._rate()],
            "stopped": self.model.stop_training,
            "states": [{k: v for k, v in state.items() if not _is_array(v)} for state in states],
            **self._circumstances(),
        }
        return {**self.replica.tensors(), "callbacks": arrays}, {"training": training, "versions": self._versions}

    def _remember(self) -> None:
        """Leave the state with the supervisor, if it is the time, and all ranks have the same.

        Raises:
            Preempted: on all ranks, once the state is there, where the supervisor has asked for the end.
        """
        if self._is_to_remember and self.replica.update.agrees:
            with progress.phase(Phase.CHECKPOINT):
                begin_s = time.monotonic()
                is_kept = self.memory.keep(self.replica.optimizer.steps, *self.state(), begin_s)
                if self._is_to_end and self.replica.comm.broadcast_json(is_kept):
                    raise Preempted("the job is to go on with more workers")

    def _go_on(self) -> None:
        """Go on from the step that the supervisor remembers, if that is later than what was resumed from."""
        found = self.memory.begin(self.replica.optimizer.steps)
        self._resume(shared(self.replica.comm, found) if self.memory.is_kept else None)

    @property
    def is_between_steps(self) -> bool:
        """Whether weights, sums and callbacks are as after a whole step, so that training can go on from `state`."""
        return self._whole_at == self.replica.optimizer.steps

    def go_on_among_fewer(self, saved: Checkpoint | None) -> None:
        """Go on from the `state` of one of the ranks, which have become fewer; every rank calls this."""
        ranks = self.replica.comm
        for batches in filter(None, (self.batches, self.validation)):
            batches.rank, batches.world_size = ranks.rank, ranks.world_size
        self.replica = self.model.replica_anew(ranks)
        if self._first_rate is not None:
            self.replica.optimizer.learning_rate = self._first_rate  # not one that the script asks for now
        self._resume(saved)
        self._whole_at = self.replica.optimizer.steps
        self.memory.close()
        self.memory.begin(self.replica.optimizer.steps)

    def resume(self, path: str | os.PathLike[str]) -> None:
        """Go on from the newest whole checkpoint under `path`, if there is one, on all ranks alike.

        Raises:
            CheckpointError: the run that was saved had other data, another batch size, seed or callbacks.
        """
        self._resume(read(self.replica.comm, path, is_ours=True))

    def _resume(self, saved: Checkpoint | None) -> None:
        if saved is not None:
            together(self.replica.comm, lambda: understood(saved, lambda: self._take_over(saved)))
            log.info("resumed from %s: epoch %d, step %d", saved.place, self.epoch, self.step)

    def _take_over(self, saved: Checkpoint) -> None:
        training = saved.values.get("training")
        if training is None:
            raise CheckpointError(f"{saved.place} holds a model, not the state of a training; load it with load()")
        for name, value in self._circumstances().items():
            if training[name] != value:
                raise CheckpointError(
                    f"{saved.place} was trained with {name} {training[name]}, this run has {value}; "
                    "use the same to go on, or another directory to begin anew"
                )
        self._compare_circumstances(saved)
        self.replica.restore(saved.tensors, training)
        self.epoch, self.step = training["epoch"], training["step"]
        self.sums = None if training["sums"] is None else np.array(training["sums"])
        self.replica.shapes = [tuple(shape) for shape in training["shapes"]]
        self.ledger.restore(training["ledger"])
        self._take_over_rate(*training["learning_rate"])
        self.model.stop_training = training["stopped"]
        for i, (callback, state) in enumerate(zip(self.callbacks, training["states"], strict=True)):
            arrays = saved.tensors.get("callbacks", {})
            own = {k.removeprefix(f"{i}/"): a for k, a in arrays.items() if k.startswith(f"{i}/")}
            callback.restore({**state, **own})

    def _compare_circumstances(self, saved: Checkpoint) -> None:
        changed = differences(saved.values["versions"], self._versions)
        if changed and self.replica.comm.rank == 0:
            log.warning("%s: %s: the run goes on, but not to the same bits", saved.place, changed)

    def _rate(self) -> float | None:
        """Return the learning rate, None where it is a schedule: that follows from the step."""
        rate = self.replica.optimizer.learning_rate
        return None if callable(rate) else float(rate)

    def _take_over_rate(self, first: float | None, last: float | None) -> None:
        """Go on with the learning rate that callbacks had set, unless the script begins with another than it did."""
        if first is None or self._rate() == first:
            self.replica.optimizer.learning_rate = last if last is not None else self.replica.optimizer.learning_rate
            self._first_rate = first
        else:
            log.warning(
                "the learning rate was %s in the run that is resumed, and is %s now, as asked", last, self._rate()
            )

    @functools.cached_property
    def _versions(self) -> dict[str, str]:
        """What the bits depend on, looked up once: to do so after each step would take longer than to remember it."""
        return circumstances()

    def _circumstances(self) -> dict[str, Any]:
        """Return what must be as it was for a run to go on."""
        return {
            "batch_size": self.batches.batch_size,
            "samples": len(self.batches.x),
            "shuffle": self.batches.shuffle,
            "seed": seed(),
            "shards": self.replica.shards,
            "metrics": [metric.name for metric in self.replica.metrics],
            "callbacks": [type(callback).__name__ for callback in self.callbacks],
        }

    def _call(self, event: str, *args: Any) -> None:
        progress.at(Phase.CALLBACK)
        if event in _ENDS:
            self._whole_at = None
        for callback in self.callbacks:
            getattr(callback, event)(*args)
        self._whole_at = self.replica.optimizer.steps


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray)
