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
from disttrain.ray import keeper
from disttrain.ray.actor import Arrival, Herald, Rank
from disttrain.ray.cluster import Request
from disttrain.ray.meeting import meeting, place

_PLACE_S = 20.0  # for Ray to find room: what is lacking is said within half a minute
_PLACE_ROUND_S = 1.0
_LOOK_S = 0.1
_SETTLE_S = 0.3  # after a failure: Ray knows by then of an actor whose death was the cause
_SILENT_S = 0.5  # after a failure: a node that has not answered by then is the cause; the supervisor waits for a second


class RankLostError(CommError):
    """A rank's actor has ended without a word.

    Attributes:
        rank: whose.
        host: where it was.
        is_near: whether that is this host, whose supervisor knows more.
        cause: in a few words.
    """

    exit_code = 128 + signal.SIGKILL  # Ray does not tell by which signal: this is what kills without a word

    def __init__(self, text: str, *, rank: int, host: str, is_near: bool, cause: str = "the loss of its actor") -> None:
        super().__init__(text)
        self.rank, self.host, self.is_near, self.cause = rank, host, is_near, cause


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
        self._keeper: Any = None  # of the last step, where rank 0 is on another node than this process
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

        for actor in filter(None, (*self._actors, *self._heralds.values(), self._keeper)):
            ray.kill(actor)
        ray.util.remove_placement_group(self._group)

    def call(self, function: Callable[..., Any], *args: Any) -> None:
        """Call ``function(*args)`` on every rank, in the main thread of its process."""
        environment = {**self._environment, **self._meeting(), **self._memory()}
        on_node: Counter[str] = Counter()
        for rank, (actor, node) in enumerate(zip(self._actors, self._nodes, strict=True)):
            own = environment | place(rank, self.size, on_node[node], self._nodes.count(node))
            on_node[node] += 1
            self._calls[actor.call.remote(own, function, *args)] = rank

    def outcomes(self) -> Iterator[tuple[int, Any] | None]:
        """Yield each rank that has returned, with what; last of all, if any has failed, the first that did, with why.

        A lost rank is why others fail, even where these can tell first. Ranks that have returned run their exit
        handlers. Several times a second None is yielded, until all have ended.
        """
        import ray

        waiting, ending, asked = dict(self._calls), list[Any](), dict[Any, int]()
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
                    failed_s = time.monotonic()
                    failure, asked = failure or (rank, outcome), asked or self.signal(0)
                else:
                    ending.append(self._actors[rank].__ray_terminate__.remote())
                    yield rank, outcome
            if failure:
                _, silent = ray.wait([*asked], num_returns=len(asked), timeout=0) if asked else ((), [])
                lost = [asked[each] for each in silent if asked[each] in waiting.values()]
                if not waiting or time.monotonic() > failed_s + (_SILENT_S if lost else _SETTLE_S):
                    yield (lost[0], self._loss_of_node(lost[0])) if lost else failure
                    return
            yield None

    def signal(self, number: int) -> dict[Any, int]:
        """Send a signal to all ranks, wherever they are; return those on other nodes, by what says that it was sent."""
        sent: dict[Any, int] = {}
        for rank, (node, arrival) in enumerate(zip(self._nodes, self._arrivals, strict=True)):
            if node in self._heralds:
                sent[self._heralds[node].send.remote(arrival.pid, number)] = rank
            else:
                Herald().send(arrival.pid, number)
        return sent

    def _place(self) -> None:
        """Reserve what the ranks need, and order them by node, this process's own first."""
        import ray
        from ray.util.placement_group import placement_group, placement_group_table

        each = {"CPU": self._request.cpus, "GPU": self._request.gpus}
        asked = {name: self.size * count for name, count in each.items() if count}
        self._group = placement_group([{name: count for name, count in each.items() if count}] * self.size,
            strategy=self._request.placement)  # fmt: skip
        deadline_s = time.monotonic() + _PLACE_S
        while not self._group.wait(_PLACE_ROUND_S):
            there = ray.cluster_resources()  # which becomes less when a node is lost
            if time.monotonic() < deadline_s and all(there.get(name, 0) >= count for name, count in asked.items()):
                continue
            free, nodes = ray.available_resources(), sum(node["Alive"] for node in ray.nodes())
            ray.util.remove_placement_group(self._group)
            raise LaunchError(
                f"Ray has no room for {self.size} worker(s), placement {self._request.placement}: asked for "
                f"{_words(asked)}; there are {_words(there, asked)} on {nodes} node(s), of which "
                f"{_words(free, asked)} are free; ask for fewer, or wait for those who have them (`ray status`)"
            )
        here = ray.get_runtime_context().get_node_id()
        node_of = placement_group_table(self._group)["bundles_to_node_id"]
        self._bundles = sorted(node_of, key=lambda bundle: (node_of[bundle] != here, node_of[bundle], bundle))
        self._nodes = [node_of[bundle] for bundle in self._bundles]

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
        return {**meeting(self._arrivals[0].address), **self._environment}

    def _memory(self) -> dict[str, str]:
        """Return the variable by which rank 0 reaches the supervisor's memory, where it is on another node."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        memory, here = self._environment.get(env.LAST_STEP), ray.get_runtime_context().get_node_id()
        if not memory or self._nodes[0] == here:
            return {}
        name = f"disttrain-keeper-{secrets.token_hex(8)}"
        options = {"name": name, "num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False)}
        self._keeper = ray.remote(keeper.Keeper).options(**options).remote(memory)
        return {env.LAST_STEP: keeper.address(name)}

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
            if "its node has died" in str(error):
                return self._loss_of_node(rank)
            said = str(error).partition("Worker exit detail: ")[2].partition(". ")[0]
            text = (
                f"rank {rank} of {self.size}, on host {arrival.host}, pid {arrival.pid}, was killed, has crashed, or "
                f"called os._exit: Ray has lost its actor{said and f' ({said})'}"
            )
            return RankLostError(text, rank=rank, host=arrival.host, is_near=arrival.host == socket.gethostname())

    def _loss_of_node(self, rank: int) -> RankLostError:
        """Return the loss of a rank with its node, of which nobody else can tell."""
        with_it = [other for other, node in enumerate(self._nodes) if node == self._nodes[rank]]
        host = self._arrivals[rank].host
        text = (
            f"rank {rank} of {self.size}, on host {host}, was lost: Ray's node there, with rank(s) "
            f"{', '.join(map(str, with_it))} of this job, does not answer any more"
        )
        return RankLostError(text, rank=rank, host=host, is_near=False, cause="the loss of its node")


def _words(resources: Mapping[str, float], names: Iterable[str] = ("CPU", "GPU")) -> str:
    return ", ".join(f"{resources.get(name, 0):g} {name}s" for name in names)
