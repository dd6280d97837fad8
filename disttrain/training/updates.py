"""Updates: what a replica does with gradients, once a step has left them in their places."""

from collections.abc import Callable, Sequence
from typing import Any

from disttrain.backend import Array
from disttrain.comm import Communicator
from disttrain.data import shard
from disttrain.data_parallel import Average, DataParallel, FlatBuffer, GradientSum, Slices
from disttrain.errors import ConfigError
from disttrain.optimizers import Optimizer
from disttrain.training.finite import is_finite


def choose(
    distribution: DataParallel, optimizer: Optimizer, buffers: Sequence[FlatBuffer], gradients: GradientSum
) -> "Update":
    """Return the kind of update that `distribution` asks for.

    Raises:
        ConfigError: `optimizer` has an `apply` of its own, which that kind does not call.
    """
    if type(optimizer).apply is not Optimizer.apply:
        for name, asked in (
            ("DataParallel(shard_optimizer=True)", distribution.shard_optimizer),
            ("gradient_accumulation_steps", optimizer.gradient_accumulation_steps is not None),
        ):
            if asked:
                raise ConfigError(
                    f"{name} needs a rule that works element by element, and {type(optimizer).__name__} has an apply() "
                    "of its own, which may look at all gradients at once: write its rule as update(), or leave this out"
                )
    kind = ShardedUpdate if distribution.shard_optimizer else LocalUpdate if distribution.local_steps > 1 else Update
    return kind(distribution, optimizer, buffers, gradients)


class Update:
    """Gradients are summed over the ranks, and every rank takes the same step.

    Args:
        distribution: that asks for it.
        optimizer: whose slots become flat, or are so already.
        buffers: where the parameters lie.
        gradients: of them.
    """

    _sums = True
    _has_all_slots = True

    def __init__(
        self, distribution: DataParallel, optimizer: Optimizer, buffers: Sequence[FlatBuffer], gradients: GradientSum
    ) -> None:
        self.distribution = distribution
        self.optimizer = optimizer
        self.buffers = buffers
        self.gradients = gradients
        self._build()

    def begin(self) -> None:
        """Say, before a step, whether its gradients are to be summed over the ranks."""
        self.gradients.is_summing = self._sums and (self.optimizer.is_due or self.gradients.keeps_sums)

    def apply(self) -> None:
        """Take the optimizer's step, or keep the gradients for a later one."""
        if self.optimizer.is_due:
            if self.gradients.keeps_sums:
                self.gradients.collect()
            self._take_step()
            self.gradients.forget()
        else:
            self.gradients.keep()
            self.optimizer.steps += 1

    def is_finite(self) -> bool:
        """Return whether gradients are, of sums that all ranks have, this rank's part of them."""
        gradients = self.gradients
        if gradients.is_summing:
            comm = gradients.comm
            places = [shard(flat.size, comm.rank, comm.world_size) for flat in gradients.flat]
            return all(is_finite(flat[p.start : p.stop]) for flat, p in zip(gradients.flat, places, strict=True))
        return all(is_finite(flat) for flat in gradients.flat)

    def skip(self) -> None:
        """Count a step that is left out, after `GradientSum.clear`; an update drops what was kept for it."""
        if self.optimizer.is_due:
            self.gradients.forget()
        self.optimizer.steps += 1

    @property
    def agrees(self) -> bool:
        """Whether all ranks have the same weights now: the same answer on all."""
        return True

    @property
    def is_whole(self) -> bool:
        """Whether this rank alone has all that training goes on from."""
        return self._has_all_slots and not self.gradients.has_parts

    @property
    def common_slots(self) -> Sequence[dict[str, Array]]:
        """The optimizer's slots for each buffer, laid out as it is, where every rank has the same; else none."""
        return self.optimizer.slots

    def settle(self) -> None:
        """Make weights and slots the same on all ranks; every rank calls this."""

    def take_over(self, comm: Communicator, source: int) -> None:
        """Make weights, and slots that every rank has, those of rank `source`; every rank calls this."""
        slots = [slot for slots in self.optimizer.slots for slot in slots.values()] if self._has_all_slots else []
        for array in [*(buffer.data for buffer in self.buffers), *slots]:
            comm.broadcast(array, source)

    def slots(self) -> dict[str, Any]:
        """Return the optimizer's slots, of whole parameters, by parameter and slot; every rank calls this."""
        return self._named(self.optimizer.slots)

    def restore(self, fill: Callable[[dict[str, Any]], None]) -> None:
        """Go on with other slots, and weights: `fill` is given arrays such as `slots` returns, to write to."""
        fill(self._named(self.optimizer.slots))

    def _build(self) -> None:
        self.optimizer.build([buffer.data for buffer in self.buffers])

    def _take_step(self) -> None:
        parameters = [buffer.data for buffer in self.buffers]
        if type(self.optimizer).apply is not Optimizer.apply:
            self.optimizer.apply(self.gradients.flat, parameters)
        else:
            self.optimizer.take_step(self.gradients.flat, parameters)

    def _named(self, slots: Sequence[dict[str, Array]]) -> dict[str, Any]:
        return {
            f"{parameter}/{slot}": array
            for buffer, arrays in zip(self.buffers, slots, strict=True)
            for slot, flat in arrays.items()
            for parameter, array in buffer.split(flat).items()
        }


class LocalUpdate(Update):
    """Every rank takes steps of its own, by the gradients of its samples; now and then weights become their mean.

    A rank's gradient is `world_size` times its part of the global one: on average over the ranks that is the global
    one, whatever parts they have. Slots are averaged only where replicas must be the same: at the end of an epoch,
    for an evaluation, in a checkpoint.
    """

    _sums = False
    _average: Average | None = None  # made at the first step: who only evaluates needs none
    _has_moved = False  # since weights and slots were averaged

    @property
    def agrees(self) -> bool:
        """Whether weights were averaged after the last step."""
        return self._average is None or not self._average.is_due

    @property
    def is_whole(self) -> bool:
        """Whether ranks have taken no steps of their own: their slots differ then."""
        return self._average is None and super().is_whole

    @property
    def common_slots(self) -> Sequence[dict[str, Array]]:
        """None."""
        return ()

    def settle(self) -> None:
        """Average weights, without compression, and slots, if there were steps since."""
        if self._average is not None and self._has_moved:
            self._average.take(exactly=True)
            self._average.mean([slot for slots in self.optimizer.slots for slot in slots.values()])
            self._has_moved = False

    def restore(self, fill: Callable[[dict[str, Any]], None]) -> None:
        """Go on with weights and slots that are the same on all ranks."""
        super().restore(fill)
        self._average = None
        self._has_moved = False

    def _take_step(self) -> None:
        if self._average is None:
            self._average = Average(self.gradients, self.buffers)
        self.gradients.collect()
        for flat in self.gradients.flat:
            flat *= self.gradients.comm.world_size
        super()._take_step()
        self._has_moved = self._average.is_due = True
        if self.optimizer.iterations % self.distribution.local_steps == 0:
            self._average.take()


class ShardedUpdate(Update):
    """Every rank gets the sums of its part of the gradients, updates that part, and sends it to all."""

    _has_all_slots = False

    @property
    def common_slots(self) -> Sequence[dict[str, Array]]:
        """None."""
        return ()

    def is_finite(self) -> bool:
        """Return whether this rank's part of the gradients is."""
        return all(map(is_finite, self._slices.gradients if self.gradients.is_summing else self.gradients.flat))

    def slots(self) -> dict[str, Any]:
        """Return the slots, gathered: for the moment of a save each rank holds all of them."""
        return self._named(self._whole(self._slices.gather))

    def restore(self, fill: Callable[[dict[str, Any]], None]) -> None:
        """Go on with this rank's part of other slots."""
        whole = self._whole(self._slices.blank)
        fill(self._named(whole))
        for name in self.optimizer.slot_names:
            self._slices.scatter([arrays[name] for arrays in whole], [own[name] for own in self.optimizer.slots])

    def _build(self) -> None:
        self._slices = Slices(self.gradients, self.buffers)

    def _take_step(self) -> None:
        self.optimizer.take_step(self._slices.gradients, self._slices.parameters)
        self._slices.gather_parameters()

    def _whole(self, make: Callable[[Sequence[Array]], list[Array]]) -> list[dict[str, Array]]:
        """Return, for each buffer, what `make` returns for the slices of each slot."""
        self.optimizer.build(self._slices.parameters)
        made = {name: make([slots[name] for slots in self.optimizer.slots]) for name in self.optimizer.slot_names}
        return [{name: arrays[number] for name, arrays in made.items()} for number in range(len(self.buffers))]
