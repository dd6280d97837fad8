"""Replica: this rank's copy of a compiled model, which takes the same steps as the other ranks' copies."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple
from functools import partial
from typing import Any

import numpy as np

from disttrain import progress
from disttrain.autodiff import Tensor
from disttrain.autodiff.plan import Plan
from disttrain.backend import Array, to_host
from disttrain.checkpoint import digest
from disttrain.comm import Communicator
from disttrain.data import Batch
from disttrain.data_parallel import DataParallel, FlatBuffer, GradientSum, broadcast_weights, total_over
from disttrain.data_parallel import compression as compressions
from disttrain.errors import CheckpointError, DeadRankError, DriftError, NonFiniteError
from disttrain.layers import Layer, Step, running
from disttrain.losses import Loss
from disttrain.metrics import Metric
from disttrain.observe import log
from disttrain.optimizers import Optimizer
from disttrain.progress import Phase
from disttrain.training import drift, finite
from disttrain.training.agreement import Fact, check_equal, check_facts, circumstances
from disttrain.training.sharded import Sharded, Sums
from disttrain.training.static import StaticStep
from disttrain.training.updates import choose
from disttrain.training.witness import asked, witnessed

_PLAIN = DataParallel()

_PLANNED = 3  # steps after which a model that is static has a plan: two alike, and this one ran by it


class Replica:
    """A model that is built, its optimizer, and the ranks that hold the other replicas.

    Making one gives all ranks the weights of rank 0, and compares.

    Args:
        model: built.
        comm: the ranks.
        buffers: where its trained weights lie.
        optimizer: whose slots become flat, or are so already.
        loss: of a sample.
        metrics: to add up beside the loss.
        static: as in `Model.compile`.
        shards: into how many a batch is cut, to be summed up in one order; None: into as many as there are ranks.
        distribution: the same.
        guard: against replicas that drift apart.
        on_nonfinite: as in `Model.compile`.

    Attributes:
        shapes: of what each metric adds up; known after the first batch.
        steps: what is computed for a batch; one for each shard of this rank.
        witness: of the steps, where `disttrain verify` asks for one.
        votes: of the last step, as summed over the ranks.

    Raises:
        CommError: the ranks' models differ; names the first weight that does.
    """

    def __init__(
        self,
        model: Layer,
        comm: Communicator,
        buffers: list[FlatBuffer],
        optimizer: Optimizer,
        loss: Loss,
        metrics: list[Metric],
        static: bool | str = "auto",
        *,
        shards: int | None = None,
        distribution: DataParallel = _PLAIN,
        guard: drift.Guard | None = None,
        on_nonfinite: str = "raise",
    ) -> None:
        self.model = model
        self.comm = comm
        self.buffers = buffers
        self.optimizer = optimizer
        self.loss = loss
        self.metrics = metrics
        steps = optimizer.gradient_accumulation_steps or 1
        self.guard = guard or drift.Guard()
        self.on_nonfinite = on_nonfinite
        self._skipped = 0  # steps in a row
        self._taken = 0  # steps, by this replica
        self._is_due = False  # a comparison of weights, as soon as they are to agree
        given = Fact(
            what="what compile() was given",
            value=[distribution.get_config(), steps, optimizer.loss_scale, astuple(self.guard), on_nonfinite],
        )
        check_facts(comm, lambda: [*circumstances(), self._layout(), given])
        self.shards = shards
        self._sharded = None
        if shards is not None:
            self._sharded = Sharded(
                model,
                comm,
                buffers,
                loss,
                static,
                shards,
                self._measure,
                bucket_bytes=distribution.bucket_bytes,
                steps=steps,
            )
        self.gradients = (
            self._sharded.gradients
            if self._sharded
            else GradientSum(
                comm,
                buffers,
                bucket_bytes=distribution.bucket_bytes,
                compression=compressions.get(distribution.compression),
                steps=steps,
                scatters=distribution.shard_optimizer,
            )
        )
        broadcast_weights(comm, model.weights)
        check_equal(comm, "the weights' digest", self.digest, "a message was damaged on its way")
        self.update = choose(distribution, optimizer.rule, buffers, self.gradients)
        self.steps = self._sharded.steps if self._sharded else [StaticStep(model, loss, self.gradients, static)]
        self._state = _state(model)
        self.witness = asked(comm)
        self.shapes: list[tuple[int, ...]] = []
        self.votes: list[float] = []

    @property
    def plans(self) -> dict[Any, Plan]:
        """The plans of a training step, by the shapes that they are for."""
        return self._sharded.plans if self._sharded else self.steps[0].training.plans

    @witnessed
    def train(self, batch: Batch, votes: Sequence[float] = ()) -> Sums:
        """Take one step on this rank's part of a global batch; return the sums of all ranks.

        Args:
            batch: this rank's part.
            votes: numbers of this rank, as many on all, to be summed over the ranks in the message that travels anyway.

        Raises:
            NonFiniteError: loss or gradients are NaN or infinite on some rank, on all; no weight was changed by it.
            DeadRankError: nor by this one, unless `optimizer.steps` has gone on.
            DriftError: the replicas have drifted apart, and this step was one to look.
        """
        number = self.optimizer.steps
        progress.begin_step(number, len(batch.samples))
        self.update.begin()
        self.gradients.scale_by(self.optimizer.loss_scale)
        before = [weight.data.copy() for weight in self._state]
        step = Step(training=True, number=number, first=batch.first, total=total_over(self.comm))
        try:
            _, sums, summed = self._compute(batch, step, votes)
            *self.votes, flaws = summed.tolist()
            if flaws or not np.isfinite(sums[0]):
                return self._leave_out(batch, step, sums, before)
        except DeadRankError:
            self._undo(before)
            raise
        self._skipped = 0
        progress.at(Phase.OPTIMIZER)
        self.update.apply()
        self._check_now_and_then(batch)
        return sums

    def evaluate(self, batches: Iterable[Batch], phase: Phase = Phase.EVALUATION) -> dict[str, Any]:
        """Return loss and metrics over `batches`, of all ranks, without changing a weight."""
        self.share_state()
        self.steps[0].evaluation.check_again()
        total: Sums | None = None
        with progress.phase(phase):
            if self._sharded:
                return self.logs(self._sharded.evaluate(batches, partial(progress.at, phase)))
            for number, batch in enumerate(batches):
                progress.at(phase, number)
                sums = self._measure(batch, *self.steps[0].evaluate(batch))
                total = sums if total is None else total + sums
            assert total is not None
            return self.logs(self.comm.all_reduce(total))

    def logs(self, sums: Sums) -> dict[str, Any]:
        """Return loss and metrics by name for what was added up in `sums`; of no sample, the loss is NaN."""
        values: dict[str, Any] = {"loss": float(sums[0] / sums[1]) if sums[1] else math.nan}
        start = 2
        for metric, shape in zip(self.metrics, self.shapes, strict=True):
            end = start + math.prod(shape)
            values[metric.name] = metric.result(sums[start:end].reshape(shape))
            start = end
        return values

    def share_state(self) -> None:
        """Make all weights the same on all ranks.

        Trained ones become their mean, where ranks take local steps; untrained ones those of rank 0, from which they
        differ where statistics are not synchronized.
        """
        self.update.settle()
        broadcast_weights(self.comm, self.model.non_trainable_weights)

    def digest(self) -> str:
        """Return the SHA-256 of all weights of this replica."""
        return digest({w.name: w.data for w in self.model.weights})

    def tensors(self) -> dict[str, dict[str, Any]]:
        """Return all arrays that make up the replica's state, by group and name: equal on all ranks, which call it."""
        kept, guesses = self.gradients.state()
        groups = {"model": self._weights(), "optimizer": self.update.slots(), "kept": kept, "guesses": guesses}
        return {group: arrays for group, arrays in groups.items() if arrays or group in ("model", "optimizer")}

    def restore(self, tensors: dict[str, dict[str, Any]], progress: dict[str, Any]) -> None:
        """Take over the arrays, and the place in training, that another replica of the same model gave.

        Args:
            tensors: of `tensors`.
            progress: of `progress`.

        Raises:
            CheckpointError: names the first array that is missing, too many, or of another shape.
        """
        kept = {}
        if tensors.get("kept"):
            kept = {w.name: np.empty(w.shape, w.dtype) for w in self.model.trainable_weights}
        accumulates = self.optimizer.gradient_accumulation_steps or 1
        gathered = progress.get("gathered", 0)
        if gathered >= accumulates:
            raise CheckpointError(
                f"the checkpoint holds the gradients of {gathered} steps that are no update yet, and "
                f"{type(self.optimizer).__name__} has gradient_accumulation_steps={accumulates}: use that of the run "
                "that was saved"
            )
        self.update.restore(
            lambda slots: copy_into({"model": self._weights(), "optimizer": slots, "kept": kept}, tensors)
        )
        self.gradients.restore(kept, tensors.get("guesses", {}))
        self.optimizer.steps = progress["iterations"] * accumulates + gathered
        self.optimizer.restore(progress)

    def progress(self) -> dict[str, Any]:
        """Return the place in training: how many updates there were, and the steps since, as JSON values."""
        steps = self.optimizer.gradient_accumulation_steps or 1
        place = {"iterations": self.optimizer.iterations, "gathered": self.optimizer.steps % steps}
        return {**place, **self.optimizer.progress()}

    def _weights(self) -> dict[str, Any]:
        return {w.name: w.data for w in self.model.weights}

    def check(self) -> None:
        """Compare trained weights, and slots, with those of all ranks, if they are to agree; every rank calls this.

        Raises:
            DriftError: they differ, and the policy is to raise.
        """
        if not self.guard.every or self.comm.world_size == 1 or not self.update.agrees:
            return
        found = drift.find(self.comm, self.buffers, self.update.common_slots)
        if found is None:
            return
        what = f"the replicas have drifted apart: after step {self.optimizer.steps - 1}, {found.words}"
        if self.guard.policy == "raise":
            raise DriftError(
                f"{what}; look for code that changes weights on one rank alone, or for faulty memory on its host; "
                "compile(on_drift='heal') goes on with the state of one rank"
            )
        if self.comm.rank == 0:
            log.warning("%s; all take over the state of rank %d", what, found.source)
        self.update.take_over(self.comm, found.source)

    def _check_now_and_then(self, batch: Batch) -> None:
        self._taken += 1
        every = self.guard.every
        if self._taken == _PLANNED and not self._sharded and self.comm.world_size > 1:
            self._check_plan(batch)
        self._is_due = self._is_due or (every > 0 and self._taken % every == 0)
        if self._is_due and self.update.agrees:
            self._is_due = False
            self.check()

    def _check_plan(self, batch: Batch) -> None:
        # of parts of other sizes the shapes differ, and it may be better to compute them by other calls
        if len(set(self.comm.all_gather_json(len(batch.x)))) == 1:
            remedy = "every rank must compute the same; look for what depends on the rank in a layer's call()"
            check_equal(self.comm, "the plan of a step", partial(self._calls, batch), remedy)

    def _calls(self, batch: Batch) -> list[list[str]]:
        """Return the calls of the plan for such a batch; none where there is no plan."""
        plan = self.steps[0].plan(batch)
        return [[row.name, row.output] for row in plan.rows()] if plan else []

    def _layout(self) -> Fact:
        weights = [[w.name, list(w.shape), str(w.dtype), w.requires_grad] for w in self.model.weights]
        return Fact(what="the model", value=weights, remedy="every rank must build the same model in the same order")

    def _compute(self, batch: Batch, step: Step, votes: Sequence[float]) -> tuple[Sums, Sums, Sums]:
        """Compute the gradients of a batch; return what this rank's part, and all, add to the sums, and votes.

        The last vote is whether this rank has seen gradients that are not finite.
        """
        if self._sharded:
            own, sums = self._sharded.train(batch, step)
            said = np.array([*votes, not self.update.is_finite()], np.float64)
            return own, sums, self.comm.all_reduce(said)  # apart: the sums are in an order of their own
        with running(step):
            y_pred, per_sample = self.steps[0].train(batch)
        progress.at(Phase.METRICS)
        own = self._measure(batch, y_pred, per_sample)
        said = np.concatenate([own, votes, [not self.update.is_finite()]])
        summed = self.comm.all_reduce(said, name=f"loss and metrics of step {step.number}")
        return own, summed[: own.size], summed[own.size :]

    def _measure(self, batch: Batch, y_pred: Array, per_sample: Array) -> Sums:
        y_true, predicted, loss = to_host(batch.y), to_host(y_pred), to_host(per_sample)
        parts = [metric.sums(y_true, predicted) for metric in self.metrics]
        self.shapes = [part.shape for part in parts]
        return np.concatenate([[loss.sum(dtype=np.float64), loss.size], *[part.ravel() for part in parts]])

    def _leave_out(self, batch: Batch, step: Step, sums: Sums, before: list[Array]) -> Sums:
        """Undo a step whose numbers are not finite, and raise, or go on; return what of `sums` is of use."""
        self._undo(before)
        scale = self.optimizer.loss_scale
        is_lowered = self.optimizer.lower_loss_scale()
        if not (is_lowered and np.isfinite(sums[0])):
            least = (
                "" if is_lowered or scale is None else f"; the loss scale is {scale:g} and cannot be lowered any more"
            )
            self._blame(batch, step, sums[0], before, least)
        elif self.comm.rank == 0:
            log.info("step %d: gradients are not finite with the loss scale %g, which halves", step.number, scale)
        self.update.skip()
        return sums if np.isfinite(sums).all() else np.zeros_like(sums)

    def _blame(self, batch: Batch, step: Step, loss: float, before: list[Array], least: str) -> None:
        """Find out where a step's numbers ceased to be finite, and raise, or warn that it is left out."""
        origin, losses = self._search(batch, step)
        self._undo(before)
        what = "the gradients are" if np.isfinite(loss) else "the loss is"
        ranks = [f"rank {rank} ({loss})" for rank, loss in enumerate(losses) if not np.isfinite(float(loss))]
        where = f" on {', '.join(ranks)} of {len(losses)}" if ranks else ""
        words = f"{what} not finite at step {step.number} (counted from 0 over all epochs){where}"
        self._skipped += 1
        if self.on_nonfinite == "raise" or self._skipped > finite.MOST_SKIPPED:
            again = f", and the {self._skipped} steps up to it were left out" if self._skipped > 1 else ""
            raise NonFiniteError(
                f"{words}{again}: {origin}{least}; no weight was changed. Look for NaN in the data, or lower the "
                "learning rate; compile(on_nonfinite='skip') leaves such steps out"
            )
        if self.comm.rank == 0:
            log.warning("%s: %s%s; the step is left out", words, origin, least)

    def _search(self, batch: Batch, step: Step) -> tuple[finite.Origin, list[str]]:
        """Compute a step once more, eagerly and without sums of gradients; return what was found, and the losses."""
        search = finite.Search(batch)
        for each in self.steps:
            each.training.check_again()
        self.gradients.is_summing = False
        with search.looking():
            own, _, _ = self._compute(batch, step, ())
        search.see_loss(own[0])
        search.see_gradients(self.model, self.gradients)
        return search.share(self.comm), self.comm.all_gather_json(str(own[0]))

    def _undo(self, before: list[Array]) -> None:
        """Forget what a step has computed, which may not be finite, or not whole."""
        for weight, array in zip(self._state, before, strict=True):
            weight.data[...] = array
        self.gradients.clear()


def _state(layer: Layer) -> list[Tensor]:
    """Return the weights that layers change themselves in a forward pass, as moving averages."""
    own = [weight for weight, trains in layer._own_weights.values() if not trains]
    return own + [weight for _, held in layer.sublayers() for weight in _state(held)]


def copy_into(own: dict[str, dict[str, Any]], saved: dict[str, dict[str, Any]]) -> None:
    """Copy `saved` arrays, by group and name, into those of the same groups, names and shapes, in place.

    Raises:
        CheckpointError: names the first array that is missing, too many, or of another shape; none was changed.
    """
    for group, arrays in own.items():
        _check_matches(arrays, saved.get(group, {}), group)
    for group, arrays in own.items():
        for name, array in arrays.items():
            array[...] = saved[group][name]


def _check_matches(arrays: dict[str, Any], saved: dict[str, Any], group: str) -> None:
    for name in sorted(arrays.keys() ^ saved.keys()):
        where = "the model has no such weight" if name in saved else "it is not in the checkpoint"
        raise CheckpointError(f"{group}: {name!r} does not match: {where}; build the model that was saved")
    for name, array in arrays.items():
        if array.shape != saved[name].shape or array.dtype != saved[name].dtype:
            raise CheckpointError(
                f"{group}: {name!r} is {saved[name].dtype} {saved[name].shape} in the checkpoint, "
                f"{array.dtype} {array.shape} in the model; build the model that was saved"
            )
