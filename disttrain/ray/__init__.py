"""Ranks as actors of Ray, which places them and watches over them; what they sum goes by disttrain's own transport.

`train` is for those who write Python; ``disttrain run --launcher ray`` runs a script in the same actors. Ray carries
the function, its result, and where the ranks meet; gradients go over TCP between nodes, and by memory within one.
"""

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from disttrain import env
from disttrain.ray.cluster import PLACEMENTS, Request, cluster
from disttrain.ray.ranks import RankLostError, Ranks

__all__ = ["PLACEMENTS", "RankLostError", "Ranks", "Request", "cluster", "train"]


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
