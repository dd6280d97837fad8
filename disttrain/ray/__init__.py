"""Ranks as actors of Ray, which places them and watches over them; what they sum goes by disttrain's own transport.

`train` is for those who write Python; ``disttrain run --launcher ray`` runs a script in the same actors, and
`DisttrainTrainer` has Ray Train place and watch over them. Ray carries the function, its result, and where the ranks
meet; gradients go over TCP between nodes, and by memory within one.
"""

import contextlib
import importlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from disttrain import env
from disttrain.errors import LaunchError
from disttrain.ray.cluster import PLACEMENTS, Request, cluster
from disttrain.ray.ranks import RankLostError, Ranks

if TYPE_CHECKING:
    from disttrain.ray.trainer import DisttrainTrainer, Report

__all__ = ["PLACEMENTS", "DisttrainTrainer", "RankLostError", "Ranks", "Report", "Request", "cluster", "train"]


def __getattr__(name: str) -> Any:
    # at their first use: they need Ray Train, and a job of ranks does not
    if name not in ("DisttrainTrainer", "Report"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.trainer"), name)
    except ImportError as error:
        raise LaunchError(f"dt.ray.{name} needs Ray Train: pip install 'disttrain[ray]': {error}") from error


def train(
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    *,
    workers: int = 1,
    cpus: float = 1.0,
    gpus: float = 0.0,
    placement: str = "PACK",
    address: str = "",
) -> Any:
    """Call ``function(*args)`` on all ranks of a job; return what it returned on rank 0.

    Within it disttrain's ranks are as in a script that ``disttrain run`` has started. Where this process has called
    ``ray.init``, that cluster is used. The arguments are those of `Request`.

    Raises:
        LaunchError: there is no Ray, no cluster at the address, or too few CPUs or GPUs in it.
        CommError: a rank has been killed, or has crashed.
        Exception: that of the first rank which failed, with its traceback there.
    """
    request = Request(workers=workers, cpus=cpus, gpus=gpus, placement=placement, address=address)
    results: dict[int, Any] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="disttrain-")))
        stack.enter_context(cluster(request, folder))
        ranks = stack.enter_context(Ranks(request, environment=env.own()))
        ranks.call(function, *args)
        for rank, outcome in filter(None, ranks.outcomes()):
            if isinstance(outcome, BaseException):
                raise outcome
            results[rank] = outcome
    return results[0]
