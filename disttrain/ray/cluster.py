"""What Ray is asked for, and the cluster that is asked: one that is there, or one for this job alone."""

import contextlib
import functools
import logging
import os
import secrets
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disttrain import env
from disttrain.comm import rendezvous
from disttrain.errors import LaunchError

PLACEMENTS = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
_CONNECT_S = 5.0
_ANSWER_S = 15.0  # from a cluster that may be busy; what it does not say is refused in half a minute
_STORE_BYTES = 100 << 20  # gradients do not go through Ray's object store


@dataclass(frozen=True, kw_only=True)
class Request:
    """What Ray is asked for.

    Attributes:
        workers: number of ranks, an actor each.
        cpus: of each; Ray has BLAS use as many threads.
        gpus: of each.
        placement: PACK, on few nodes, or SPREAD, on many, where possible; STRICT_PACK or STRICT_SPREAD: or not at all.
        address: of a Ray cluster, as ``auto`` or ``host:port``; empty: ``RAY_ADDRESS``, else one of the job's own.
    """

    workers: int
    cpus: float = 1.0
    gpus: float = 0.0
    placement: str = "PACK"
    address: str = ""


@contextlib.contextmanager
def cluster(request: Request, folder: Path) -> Iterator[None]:
    """Be connected to the cluster of `request`, or to one of its own, whose files are in `folder`.

    One of its own listens on loopback only, behind a token, and has as many CPUs as the workers ask for: as under other
    launchers, there may be more workers than cores.

    Raises:
        LaunchError: there is no Ray, or no cluster at the address.
    """
    if sys.modules.get("ray") and sys.modules["ray"].is_initialized():
        yield
        return
    # Ray reads these when it is imported. Ranks may write the same lines, and its advice to start nodes comes too late.
    for name in ("RAY_DEDUP_LOGS", "RAY_COLOR_PREFIX", "RAY_SCHEDULER_EVENTS"):
        os.environ.setdefault(name, "0")
    address = request.address or env.ray_address()
    if not address:
        own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _token()}
        own["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # which switches Ray to loopback, on any system
        own["RAY_worker_niceness"] = "0"  # as under other launchers; Ray's actors otherwise go last, with 15
        os.environ.update(own)
    try:
        import ray
    except ModuleNotFoundError as error:
        raise LaunchError("this needs Ray: pip install 'disttrain[ray]'") from error
    options: dict[str, Any] = {"logging_level": logging.ERROR, "include_dashboard": False}
    try:
        if address:
            _reach(address)
            ray.init(address, logging_level=logging.ERROR)
        else:
            cpus = max(os.cpu_count() or 1, -(-request.workers * request.cpus // 1))
            ray.init("local", num_cpus=int(cpus), object_store_memory=_STORE_BYTES, _temp_dir=str(folder), **options)
    except Exception as error:  # Ray raises that too, where a node does not start within half a minute
        if address:
            raise LaunchError(_no_cluster(address, error)) from error
        raise LaunchError(f"Ray cannot be started here: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


@functools.cache
def _token() -> str:
    """Return the token of clusters that this process starts: Ray reads it once, for all of them."""
    return secrets.token_hex(32)


def _reach(address: str) -> None:
    """Raise an error where nobody listens at an address, or what does is no cluster that lets this process in.

    Ray itself would try for minutes, and wait for ever for a cluster that has another token.
    """
    try:
        from ray._private.authentication import authentication_token_setup as tokens
        from ray._private.services import canonicalize_bootstrap_address
        from ray._raylet import GcsClient
    except ImportError:  # none is public; without them it takes as long as Ray takes
        return
    if address == "auto":
        tokens.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    tokens.ensure_token_if_auth_enabled(create_token_if_missing=False)  # to ask without one would abort the process
    place = canonicalize_bootstrap_address(address) or ""
    socket.create_connection(rendezvous.parsed(place), _CONNECT_S).close()
    answers = list[Exception | None]()

    def ask() -> None:
        try:
            GcsClient(address=place)
        except Exception as error:  # of Ray's own kinds: it is raised again where it is waited for
            answers.append(error)
        else:
            answers.append(None)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_ANSWER_S)
    answer = answers[0] if answers else TimeoutError(f"what listens there has said nothing for {_ANSWER_S:.0f} s")
    if answer is not None:
        raise answer


def _no_cluster(address: str, error: Exception) -> str:
    if type(error).__name__ == "AuthenticationError":
        return (
            f"the Ray cluster at {address!r} wants another token: RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH or "
            "RAY_AUTH_TOKEN, are to be here what they are on its nodes"
        )
    return (
        f"no Ray cluster answers at {address!r}: {error}; `ray start --head` starts one, and without an address a job "
        "has one of its own"
    )
