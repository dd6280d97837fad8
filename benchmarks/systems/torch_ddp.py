"""PyTorch's DistributedDataParallel over gloo, with `torch`'s last variant; one worker trains the model as it is."""

import atexit
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import disttrain as dt
from benchmarks.architecture import Array
from benchmarks.systems import Built
from benchmarks.systems import torch as alone
from benchmarks.systems.torch import PACKAGES, PRECISION, product
from benchmarks.workloads import Workload

__all__ = ["PACKAGES", "PRECISION", "agreed", "build", "product", "variants"]


def variants(workload: Workload, task: str) -> Sequence[str]:
    """Return the last of torch's."""
    return alone.variants(workload, task)[-1:]


def agreed(number: int) -> int:
    """Return rank 0's number."""
    return int(dt.init().broadcast_json(number))


def build(workload: Workload, variant: str) -> Built:
    """Return the model on this rank's rows of the batch; what a step returns is made the mean over ranks by `float`."""
    ranks = dt.init()
    if ranks.world_size == 1:
        return alone.build(workload, variant)
    folder = ranks.broadcast_json(tempfile.mkdtemp() if ranks.rank == 0 else None)
    if ranks.rank == 0:
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    method = f"file://{folder}/gloo"
    distributed.init_process_group("gloo", init_method=method, rank=ranks.rank, world_size=ranks.world_size)
    atexit.register(distributed.destroy_process_group)

    def part(batch: Array) -> Array:
        return batch[len(batch) * ranks.rank // ranks.world_size : len(batch) * (ranks.rank + 1) // ranks.world_size]

    built = alone.build(workload, variant, wrapped=DistributedDataParallel, part=part)
    step = built.step
    assert step is not None
    return replace(built, step=lambda: _Loss(step()))


class _Loss:
    """A loss on each rank, of batches that are equally long."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def __float__(self) -> float:
        mean = self._own.clone()
        distributed.all_reduce(mean)
        return float(mean.item() / distributed.get_world_size())
