"""The ranks of a job as Ray has placed them: they are called, sent signals, and waited for, together."""

import secrets
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Self

from disttrain import env
from disttrain.errors import CommError, LaunchError
from disttrain.ray.actor import Arrival, Herald, Rank
from disttrain.ray.cluster import Request

_PLACE_S = 20.0  # for Ray to find room: what is lacking is said within half a minute
_LOOK_S = 0.1
_SETTLE_S = 0.3  # after a failure: Ray knows by then of an actor whose death was the cause


class RankLostError(CommError):
    """A rank's actor has ended without a word.

    Attributes:
        rank: whose.
        host: where it was.
        is_near: whether that is this host.
    """

    exit_code = 128 + signal.SIGKILL  # Ray does not tell by which signal: this is what kills without a word

    def __init__(self, text: str, *, rank: int, host: str, is_near: bool) -> None:
        super().__init__(text)
        self.rank, self.host, self.is_near = rank, host, is_near


class Ranks:
    """The ranks of a job, placed by Ray from ``with`` to its end, which ends them.

    Args:
        request: what Ray is asked for.
        environment: variables that each has beside those that tell it its place.
        folder: the current directory of each; empty: as Ray has it.
        script: a file that each must find there; empty: none.
    """

    def __init__(self, request: Request, *, environment: Mapping[str, str], folder: str = "", script: str = "") -> None:
        self.size = request.workers
        self._request = request
        self._environment = environment
        self._folder = folder
        self._script = script
        self._group: Any = None
        self._actors: list[Any] = []
        self._nodes: list[str] = []  # by rank
        self._heralds: dict[str, Any] = {}  # by node, of all but this process's own
        self._arrivals: list[Arrival] = []
        self._calls: dict[Any, int] = {}  # ranks by what they are to return

    def __enter__(self) -> Self:
        """Place the ranks.

        Raises:
            LaunchError: there are too few CPUs or GPUs, or a rank cannot start where it was placed.
        """
        self._place()
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        import ray

        for actor in (*self._actors, *self._heralds.values()):
            ray.kill(actor)
        ray.util.remove_placement_group(self._group)

    def call(self, function: Callable[..., Any], *args: Any) -> None:
        """Call ``function(*args)`` on every rank, in the main thread of its process."""
        environment = {**self._environment, **self._meeting()}
        on_node: Counter[str] = Counter()
        for rank, (actor, node) in enumerate(zip(self._actors, self._nodes, strict=True)):
            place = {
                env.RANK: rank,
                env.WORLD_SIZE: self.size,
                env.LOCAL_RANK: on_node[node],
                env.LOCAL_SIZE: self._nodes.count(node),
            }
            on_node[node] += 1
            own = {**environment, **{name: str(value) for name, value in place.items()}}
            self._calls[actor.call.remote(own, function, *args)] = rank

    def outcomes(self) -> Iterator[tuple[int, Any] | None]:
        """Yield each rank that has returned, with what; last of all, if any has failed, the first that did, with why.

        A lost rank is why others fail, even where these can tell first. Ranks that have returned run their exit
        handlers. Several times a second None is yielded, until all have ended.
        """
        import ray

        waiting, ending = dict(self._calls), list[Any]()
        failure: tuple[int, BaseException] | None = None
        while waiting or ending:
            ready, _ = ray.wait([*waiting, *ending], timeout=_LOOK_S)
            ending = [each for each in ending if each not in ready]
            for rank, reference in [(waiting.pop(each), each) for each in ready if each in waiting]:
                outcome = self._outcome(rank, reference)
                if isinstance(outcome, RankLostError):
                    yield rank, outcome
                    return
                if isinstance(outcome, BaseException):
                    failure, failed_s = failure or (rank, outcome), time.monotonic()
                else:
                    ending.append(self._actors[rank].__ray_terminate__.remote())
                    yield rank, outcome
            if failure and (not waiting or time.monotonic() > failed_s + _SETTLE_S):
                yield failure
                return
            yield None

    def signal(self, number: int) -> None:
        """Send a signal to all ranks, wherever they are."""
        for node, arrival in zip(self._nodes, self._arrivals, strict=True):
            if node in self._heralds:
                self._heralds[node].send.remote(arrival.pid, number)
            else:
                Herald().send(arrival.pid, number)

    def _place(self) -> None:
        """Reserve what the ranks need, and order them by node, this process's own first."""
        import ray
        from ray.util.placement_group import placement_group, placement_group_table

        each = {"CPU": self._request.cpus, "GPU": self._request.gpus}
        asked = {name: self.size * count for name, count in each.items() if count}
        there = ray.cluster_resources()
        self._group = placement_group([{name: count for name, count in each.items() if count}] * self.size,
            strategy=self._request.placement)  # fmt: skip
        if any(there.get(name, 0) < count for name, count in asked.items()) or not self._group.wait(_PLACE_S):
            free = ray.available_resources()
            ray.util.remove_placement_group(self._group)
            raise LaunchError(
                f"Ray has no room for {self.size} worker(s), placement {self._request.placement}: asked for "
                f"{_words(asked)}; there are {_words(there, asked)} on {len(ray.nodes())} node(s), of which "
                f"{_words(free, asked)} are free; ask for fewer, or wait for those who have them (`ray status`)"
            )
        here = ray.get_runtime_context().get_node_id()
        nodes = placement_group_table(self._group)["bundles_to_node_id"]
        self._bundles = sorted(nodes, key=lambda bundle: (nodes[bundle] != here, nodes[bundle], bundle))
        self._nodes = [nodes[bundle] for bundle in self._bundles]

    def _start(self) -> None:
        """Start the actors, and have them say where they are."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

        actor, herald = ray.remote(Rank), ray.remote(Herald)
        for node in set(self._nodes) - {ray.get_runtime_context().get_node_id()}:
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            self._heralds[node] = herald.options(num_cpus=0, scheduling_strategy=there).remote()
        for rank, bundle in enumerate(self._bundles):
            where = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle)
            options = {"num_cpus": self._request.cpus, "num_gpus": self._request.gpus, "scheduling_strategy": where}
            self._actors.append(actor.options(max_restarts=0, **options).remote(rank))
        try:
            arrivals = [actor.arrive.remote(self._folder, self._script) for actor in self._actors]
            self._arrivals = [Arrival(*each) for each in ray.get(arrivals)]
        except ray.exceptions.RayTaskError as error:
            raise LaunchError(str(error.cause)) from None
        except ray.exceptions.RayError as error:
            raise LaunchError(f"a worker cannot start on its node: {error}") from error

    def _meeting(self) -> dict[str, str]:
        """Return the variables by which the ranks find each other."""
        if self.size == 1:
            return {}
        meeting = {env.RENDEZVOUS: self._arrivals[0].address, env.SECRET: secrets.token_hex(32)}
        return {env.TRANSPORT: "tcp", **meeting, **self._environment}

    def _outcome(self, rank: int, reference: Any) -> Any:
        """Return what a rank has returned, or the exception that ended it."""
        import ray

        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            return error.as_instanceof_cause()
        except ray.exceptions.TaskCancelledError as error:
            return error
        except ray.exceptions.RayActorError as error:
            arrival = self._arrivals[rank]
            said = str(error).partition("Worker exit detail: ")[2].partition(". ")[0]
            text = (
                f"rank {rank} of {self.size}, on host {arrival.host}, pid {arrival.pid}, was killed, has crashed, or "
                f"called os._exit: Ray has lost its actor{said and f' ({said})'}"
            )
            return RankLostError(text, rank=rank, host=arrival.host, is_near=arrival.host == socket.gethostname())


def _words(resources: Mapping[str, float], names: Iterable[str] = ("CPU", "GPU")) -> str:
    return ", ".join(f"{resources.get(name, 0):g} {name}s" for name in names)
