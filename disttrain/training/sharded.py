"""A step in fixed shards of the global batch, added up in one order: the same bits on any number of workers."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from disttrain.autodiff.plan import Plan
from disttrain.autodiff.together import together
from disttrain.backend import Array
from disttrain.comm import Communicator
from disttrain.comm.canonical import Layout
from disttrain.data import Batch, shard
from disttrain.data_parallel import FlatBuffer, ShardSum, shard_total, total_over
from disttrain.layers import Layer, Step, running
from disttrain.losses import Loss
from disttrain.training.static import StaticStep
from disttrain.training.turns import Turns

Sums = np.ndarray[Any, Any]  # of the loss, of samples, and of each metric: float64, added over steps and ranks
Measure = Callable[[Batch, Array, Array], Sums]  # of a batch, the outputs, and each sample's loss


class Sharded:
    """The shards of this rank, each computed by the same calls on the same shapes wherever it is.

    Args:
        model: built.
        comm: the ranks.
        buffers: where the trained weights lie.
        loss: of a sample.
        static: as in `Model.compile`.
        shards: into how many a global batch is cut; one of few samples, into one for each.
        measure: returns what a shard adds to the sums of loss and metrics.
        bucket_bytes: as of `GradientSum`.
        steps: the same.

    Attributes:
        gradients: of the whole batch, after `train`.
        steps: what is computed for each shard of this rank: each has plans, and memory, of its own; the first also
            evaluates.
    """

    def __init__(
        self,
        model: Layer,
        comm: Communicator,
        buffers: list[FlatBuffer],
        loss: Loss,
        static: bool | str,
        shards: int,
        measure: Measure,
        *,
        bucket_bytes: int | None,
        steps: int,
    ) -> None:
        self.comm = comm
        self.shards = shards
        self.measure = measure
        parts = [shard(shards, rank, comm.world_size) for rank in range(comm.world_size)]
        self._runs = tuple(range(part.start, part.stop) for part in parts)
        self._run = self._runs[comm.rank]
        self._turns = Turns(self._total_of)
        self.gradients = ShardSum(comm, buffers, self._run, self._number, bucket_bytes=bucket_bytes, steps=steps)
        self._is_together = False  # whether all shards of this rank are computed at once
        self._plans: dict[Plan, Plan | None] = {}  # of all shards of this rank, by that of its first
        self.steps = [StaticStep(model, loss, self.gradients, static) for _ in self._run or [0]]
        self._layouts: dict[int, Layout] = {}

    @property
    def plans(self) -> dict[Any, Plan]:
        """The plans of a step, by the shapes of a shard: of all shards of this rank, or else of one."""
        return {key: self._plans.get(one) or one for key, one in self.steps[0].training.plans.items()}

    def train(self, batch: Batch, step: Step) -> tuple[Sums, Sums]:
        """Compute the gradients of a global batch, of which `batch` is this rank's part.

        Returns:
            What this rank's shards, and what all, add to the sums of loss and metrics.
        """
        self.gradients.layout = self._layout(batch)
        step = replace(step, total=total_over(self))
        parts = self._cut(batch)
        plan = self._plan(parts)
        if plan is not None:
            sums = self._train_together(plan, batch, parts, step)
        else:
            sums = self._turns.run([partial(self._train, number, part, step) for number, part in enumerate(parts)])
        own = np.sum(sums, axis=0)
        return own, self._summed(sums, self.gradients.layout)

    def evaluate(self, batches: Iterable[Batch], report: Callable[[int], None]) -> Sums:
        """Return what all batches add to the sums of loss and metrics, over all ranks.

        Args:
            batches: this rank's parts of them.
            report: called with the number of each batch.
        """
        sums: list[Sums] = []
        layout: Layout | None = None
        for number, batch in enumerate(batches):
            report(number)
            layout = layout or self._layout(batch)  # of the first: no later one has more samples
            for i, part in enumerate(self._cut(batch)):
                added = self.measure(part, *self.steps[0].evaluate(part))
                if i == len(sums):
                    sums.append(added)
                else:
                    sums[i] += added
        assert layout is not None
        total: Sums = self._summed(sums, layout)
        return total

    def all_reduce(self, array: Array) -> Array:
        """Replace `array`, of the shard that is computed, by the sum over all shards, in place, and return it."""
        array[...] = self._turns.sum(array)
        return array

    def total(self, parts: list[Array]) -> Array:
        """Return the sum of `parts`, one of each shard of this rank, and of what other ranks give; overwrites them."""
        return self._summed(parts, self.gradients.layout)

    def _plan(self, parts: list[Batch]) -> Plan | None:
        """Return the plan that computes all shards of this rank at once, if there is one to rely on."""
        one = self.steps[0].plan(parts[0])
        if one is None or len(parts) == 1 or len({len(part.x) for part in parts}) > 1:
            return None
        if one not in self._plans:
            gradients = self.gradients
            delivery = {"home": gradients.home, "final": gradients.final, "meanwhile": gradients.meanwhile}
            self._plans[one] = together(one, len(parts), **delivery)
        return self._plans[one]

    def _train_together(self, plan: Plan, batch: Batch, parts: list[Batch], step: Step) -> list[Sums]:
        """Compute all shards of this rank at once; return what each adds to the sums of loss and metrics."""
        self._is_together = True
        try:
            with running(replace(step, first=batch.first)):
                self.gradients.begin()
                outputs = plan.run([batch.x, batch.y])
                self.gradients.finish()
        finally:
            self._is_together = False
        each = len(outputs) // len(parts)
        return [self.measure(part, *outputs[n * each : (n + 1) * each]) for n, part in enumerate(parts)]

    def _train(self, number: int, part: Batch, step: Step) -> Sums:
        with running(replace(step, first=part.first, keeps=number == 0)):
            outputs = self.steps[number].train(part)
        return self.measure(part, *outputs)

    def _number(self) -> int | None:
        return None if self._is_together else self._turns.number

    def _total_of(self, parts: list[Array]) -> Array:
        return self._summed(parts, self.gradients.layout).copy()  # `parts` are arrays that computations go on with

    def _summed(self, parts: list[Array], layout: Layout) -> Array:
        present = layout.shards(self.comm.rank)
        return shard_total(self.comm, layout, parts[: len(present)], like=parts[0])

    def _cut(self, batch: Batch) -> list[Batch]:
        """Return the shards in this rank's part of a batch: one without samples, where there is none."""
        places = [shard(batch.global_size, number, self.shards) for number in self._run]
        return [
            replace(
                batch,
                x=batch.x[place.start - batch.first : place.stop - batch.first],
                y=None if batch.y is None else batch.y[place.start - batch.first : place.stop - batch.first],
                first=place.start,
            )
            for place in places
            if place.start < place.stop
        ] or [batch]

    def _layout(self, batch: Batch) -> Layout:
        present = min(self.shards, batch.global_size)
        if present not in self._layouts:
            self._layouts[present] = Layout(runs=self._runs, present=present)
        return self._layouts[present]
