"""Ray Train: `DisttrainTrainer` calls a function on workers that are ranks of a job, `Report` tells Ray how they do.

Ray Train places the workers, keeps checkpoints, and starts all workers again when one fails.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ray import train
from ray.train.backend import BackendConfig
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from disttrain import comm
from disttrain.ray.meeting import held_port, meeting, place
from disttrain.training.callbacks import BackupAndRestore, Logs


class DisttrainTrainer(DataParallelTrainer):
    """Ray Train's trainer for disttrain: calls a function on each worker, where `dt.init` joins them to a job.

    Args:
        train_loop_per_worker: takes nothing, or `train_loop_config`.
        options: of every trainer of Ray: ``train_loop_config``, ``scaling_config``, ``run_config``, ``datasets``,
            ``dataset_config``.
    """

    def __init__(self, train_loop_per_worker: Callable[..., Any], **options: Any) -> None:
        super().__init__(train_loop_per_worker, backend_config=_Ranks(), **options)


class _Ranks(BackendConfig):
    """What Ray Train asks of a framework: here, what is around the function on each worker."""

    @property
    def train_func_context(self) -> Callable[[], contextlib.AbstractContextManager[None]]:
        return _ranked


@contextlib.contextmanager
def _ranked() -> Iterator[None]:
    """Have this worker know its place among the ranks, and where they meet."""
    context = train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    os.environ.update(place(rank, size, context.get_local_rank(), context.get_local_world_size()))
    with contextlib.ExitStack() as held:
        if size > 1:
            port, address = held_port()
            held.enter_context(port)
            os.environ.update(broadcast_from_rank_zero(meeting(address) if rank == 0 else None))
        yield


class Report(BackupAndRestore):
    """Reports the values of each epoch to Ray Train, with the state of training as the checkpoint that belongs to them.

    A `fit` goes on from the newest checkpoint that Ray has of this run: after a failure, or when a run with the same
    name and ``storage_path`` is begun again. Both end with the same bits as a run that nobody disturbed.
    """

    def __init__(self) -> None:
        super().__init__("", keep=1)  # a folder of each rank's own, which is made when training begins

    def on_train_begin(self) -> None:
        """Go on from Ray's newest checkpoint, if there is one."""
        folder = tempfile.TemporaryDirectory(prefix="disttrain-")
        self.backup_dir = self.model.current_fit.held.enter_context(folder)
        found = train.get_checkpoint()
        if found is not None and comm.current().rank == 0:
            found.to_directory(self.backup_dir)
        super().on_train_begin()

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        """Report, and have Ray keep the state."""
        super().on_epoch_end(epoch, logs)
        self.model.current_fit.saver.wait()
        is_first = comm.current().rank == 0
        kept = train.Checkpoint.from_directory(Path(self.backup_dir)) if is_first else None
        train.report({name: float(value) for name, value in logs.items() if np.ndim(value) == 0}, checkpoint=kept)
