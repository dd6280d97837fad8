"""Surviving: where the transport can lose a rank, the others go on without a restart.

Between two steps each rank has all of the training's state. The one that has come furthest gives its own to the others,
so that at most the step is lost in which the rank was, and all go on with the same bits.
"""

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np

from disttrain import env, progress
from disttrain.backend import to_host
from disttrain.checkpoint import Checkpoint
from disttrain.checkpoint.format import plain
from disttrain.errors import CheckpointError, DeadRankError
from disttrain.observe import log
from disttrain.training.saving import shared

if TYPE_CHECKING:
    from disttrain.training.fit import Fit


def survive(fit: "Fit", loss: DeadRankError) -> None:
    """Go on among the ranks that are left, all of which call this once they have met the `loss`.

    Raises:
        DeadRankError: they cannot; says why.
    """
    ranks, size = fit.replica.comm, fit.replica.comm.world_size
    lost: list[int] = []
    fit.saver.give_up()
    own, why_not = _own_state(fit)
    place, has_groups = [fit.epoch, fit.step], ranks.has_groups
    while True:
        try:
            lost += ranks.shrink()
            told = ranks.all_gather_json([None if own is None else place, why_not, has_groups])
            places = [its for its, *_ in told]
            newest = max(filter(None, places), default=None)
            if any(had for *_, had in told):
                reason = "the script has split its ranks into groups"
            elif ranks.world_size < env.min_workers():
                reason = f"they are fewer than --min-workers {env.min_workers()}"
            elif newest is None:
                reason = told[0][1]
            else:
                reason = ""
                fit.go_on_among_fewer(shared(ranks, own, places.index(newest)))
        except DeadRankError:
            continue  # another one
        break
    words = f"rank{'s' if len(lost) > 1 else ''} {', '.join(map(str, sorted(lost)))} of {size} died"
    if reason:
        if ranks.rank == 0:
            log.warning("%s; the other %d cannot go on alone: %s", words, ranks.world_size, reason)
        with contextlib.suppress(DeadRankError):
            ranks.barrier()  # whoever raises ends all: not before that is said
        raise DeadRankError(f"{words}, and the others cannot go on alone: {reason}") from loss
    progress.shrunk_to(ranks.world_size)
    if ranks.rank == 0:
        log.warning(
            "%s; the other %d go on without a restart, from step %d, numbered anew; their outputs keep their labels",
            words, ranks.world_size, fit.replica.optimizer.steps,
        )  # fmt: skip


def _own_state(fit: "Fit") -> tuple[Checkpoint | None, str]:
    """Return a copy of this rank's state, None where it is not whole, and why others could not go on from it."""
    if not fit.replica.update.is_whole:
        return None, "each had a part of the state: a shard of the optimizer, or gradients that are no update yet"
    if not fit.is_between_steps:
        return None, "callbacks were being told of the end of a step, or an epoch"
    tensors, values = fit.state()
    try:
        told = plain(values)
    except CheckpointError as error:
        return None, str(error)
    copied: dict[str, dict[str, Any]] = {
        group: {name: np.array(to_host(array)) for name, array in arrays.items()} for group, arrays in tensors.items()
    }
    return Checkpoint(place="another rank", tensors=copied, values=told), ""
