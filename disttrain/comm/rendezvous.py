"""How the ranks of a job find each other, and how each proves to the other that it belongs to the job.

An exchange gives every rank the values of all: through the job's folder on one host, or through rank 0, whose address
all know. Over a network, whoever connects proves that it knows the job's secret before anything that it sends is looked
at, and so does whoever accepts. The listening socket is open only until all ranks have come.

Handshake, in pieces of fixed size: the one that accepts sends a nonce, the other one its claim (from which rank to
which, for which channel), a nonce, and a proof; the one that accepts answers with a proof, or with a refusal. A proof
is the HMAC-SHA256 of role, job, claim and both nonces under the secret, so that none serves twice. Source: RFC 2104;
ISO/IEC 9798-4, mutual authentication in three passes. What is sent afterwards is not encrypted.
"""

import contextlib
import errno
import hashlib
import hmac
import ipaddress
import itertools
import json
import os
import select
import socket
import stat
import struct
import time
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import psutil

from disttrain import env
from disttrain.comm.segments import Exchange
from disttrain.comm.waiting import wait_until
from disttrain.errors import ConfigError, LaunchError
from disttrain.observe import log

JOIN_S = 300.0  # until all ranks have imported what their script does first
_GREETING_S = 5.0  # until a connection has proved itself
_MOST_GREETINGS = 256  # that have not; the oldest makes way
_RETRY_S = 0.05
_LOOK_MS = 250
_SAY_S = 10.0  # between warnings of refusals: a scan must not fill a disk with them
_LEAST_SECRET_BYTES = 16

_MAGIC = b"disttrain tcp 1\n"
_NONCE_BYTES = _PROOF_BYTES = hashlib.sha256().digest_size
_REFUSAL = bytes(_PROOF_BYTES)  # an end without it is that of a connection which had to make way
_CLAIM = struct.Struct("<III")
_LENGTH = struct.Struct("<I")
_VALUE_BYTES = 1 << 12  # of a rank, in JSON

_exchanges = itertools.count()  # of this process in its folder; the same on all ranks


class Claim(NamedTuple):
    """Which rank connects to which, and for what."""

    source: int
    dest: int
    channel: int


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What proves that a rank belongs to a job: a secret, and what tells this job from others with the same one."""

    secret: bytes
    job: str

    def proof(self, role: bytes, claim: bytes, nonces: bytes) -> bytes:
        """Return what only those who know the secret can make, for one connection and one `role` in it."""
        job = hashlib.sha256(self.job.encode()).digest()
        return hmac.digest(self.secret, role + job + claim + nonces, "sha256")


def secret() -> bytes:
    """Return the job's secret, as the environment gives it.

    Raises:
        LaunchError: there is none, it is short, or others can read it.
    """
    text, file = env.secret(), env.secret_file()
    if not text and file:
        if stat.S_IMODE(file.stat().st_mode) & 0o077:
            raise LaunchError(f"others can read the job's secret in {file}: chmod 600 it")
        text = file.read_text().strip()
    if len(text) < _LEAST_SECRET_BYTES:
        raise LaunchError(
            f"ranks that meet at {env.RENDEZVOUS} need a secret of at least {_LEAST_SECRET_BYTES} characters, the same "
            f"on all: in {env.SECRET}, or in a file of mode 0600 that {env.SECRET_FILE} names"
        )
    return text.encode()


def own_host(rendezvous: str = "") -> str:
    """Return the address at which this rank listens: of the interface that the environment names, else of the one that
    leads to `rendezvous`, else of this host alone.
    """  # noqa: D205 - one sentence
    asked = env.interface()
    if asked:
        families = (socket.AF_INET, socket.AF_INET6)
        found = [each.address for each in psutil.net_if_addrs().get(asked, []) if each.family in families]
        return found[0] if found else asked
    if not rendezvous:
        return "127.0.0.1"
    family, kind, _, _, address = socket.getaddrinfo(*parsed(rendezvous), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # of a datagram socket: nothing is sent
        return str(probe.getsockname()[0])


def parsed(address: str) -> tuple[str, int]:
    """Return host and port of ``host:port``; an IPv6 address stands in brackets."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"{env.RENDEZVOUS}={address}: expected host:port, where rank 0 listens")
    return host.strip("[]"), int(port)


def exchange_in(folder: Path, place: env.Place) -> Exchange:
    """Return what exchanges JSON values through files in the job's private folder, among ranks of one host.

    Raises:
        LaunchError: others could write to the folder; from the exchange: a rank has not come.
    """
    found = folder.stat()
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022:
        raise LaunchError(f"others can write to the job's folder {folder}: it must belong to this user, with mode 0700")

    def exchange(value: Any) -> list[Any]:
        number = next(_exchanges)
        own = folder / f"exchange.{number}.{place.rank}"
        written = own.with_suffix(f".{place.rank}.tmp")
        written.write_text(json.dumps(value))
        written.rename(own)
        files = [folder / f"exchange.{number}.{other}" for other in range(place.world_size)]
        for other, file in enumerate(files):
            if not wait_until(file.exists, JOIN_S):
                raise LaunchError(
                    f"rank {other} of {place.world_size} has not come within {JOIN_S:.0f} s: {file} is missing"
                )
        return [json.loads(file.read_text()) for file in files]

    return exchange


def exchange_at(address: str, place: env.Place, secret: bytes) -> Exchange:
    """Return what exchanges JSON values of at most 4 KiB each through rank 0, which listens at `address`.

    Raises:
        ConfigError: `address` is not one.
        LaunchError: from the exchange: rank 0 cannot listen there, a rank has not come, or is not of this job.
    """
    host, port = parsed(address)
    numbers = itertools.count()

    def exchange(value: Any) -> list[Any]:
        channel = next(numbers)
        job = Pass(secret=secret, job=f"rendezvous of {place.world_size}")
        most_bytes = place.world_size * (_VALUE_BYTES + 2)
        deadline_s = time.monotonic() + JOIN_S
        if place.rank:
            with dial((host, port), Claim(place.rank, 0, channel), job, deadline_s) as peer:
                _send_json(peer, value)
                values: list[Any] = _receive_json(peer, most_bytes)
                return values
        with Listener(host, port) as listener:
            others = range(1, place.world_size)
            peers = listener.accept([Claim(rank, 0, channel) for rank in others], job, deadline_s)
        try:
            ordered = [peers[Claim(rank, 0, channel)] for rank in others]
            values = [value, *(_receive_json(peer, _VALUE_BYTES) for peer in ordered)]
            for peer in ordered:
                _send_json(peer, values)
            return values
        finally:
            for peer in peers.values():
                peer.close()

    return exchange


class Listener:
    """A socket that listens at `host` until it is closed, and lets in those who belong to the job.

    Raises:
        LaunchError: nobody can listen there, or it is every address of this host.
    """

    def __init__(self, host: str, port: int = 0) -> None:
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            if ipaddress.ip_address(address[0]).is_unspecified:
                raise LaunchError(
                    f"a rank is to listen at {host}, which is all addresses of its host: expected one of them, or "
                    f"{env.INTERFACE} with the name of an interface"
                )
            self._socket = socket.create_server((host, port), family=family, backlog=1024)
        except OSError as error:
            raise LaunchError(f"cannot listen at {host}:{port}: {error}; {env.INTERFACE} names where to") from error
        self._socket.setblocking(False)
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        self._greetings: deque[_Greeting] = deque()  # the oldest first
        self._refusals = _Refusals()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let in nobody any more."""
        self._forget_greetings()
        self._socket.close()

    def accept(self, claims: Collection[Claim], job: Pass, deadline_s: float) -> dict[Claim, socket.socket]:
        """Return a connection for each of `claims`; anything else that connects is refused, and logged.

        Args:
            claims: of those who are to connect.
            job: what they must know.
            deadline_s: by `time.monotonic`.

        Raises:
            LaunchError: some have not come by then.
        """
        found: dict[Claim, socket.socket] = {}
        try:
            while missing := [claim for claim in claims if claim not in found]:
                if time.monotonic() > deadline_s:
                    ranks = ", ".join(str(rank) for rank in sorted({claim.source for claim in missing}))
                    raise LaunchError(f"rank(s) {ranks} have not come to {self.address[0]}:{self.address[1]} in time")
                found |= self.admit(missing, job)
        except BaseException:
            for connection in found.values():
                connection.close()
            raise
        finally:
            self._forget_greetings()
        return found

    def admit(self, claims: Collection[Claim], job: Pass, wait_ms: int = _LOOK_MS) -> dict[Claim, socket.socket]:
        """Return connections that have proved by now which of `claims` they are, after waiting `wait_ms` at most."""
        found: dict[Claim, socket.socket] = {}
        greetings = self._greetings
        ready = _ready([self._socket, *(each.connection for each in greetings)], wait_ms)
        for greeting in [each for each in greetings if each.connection.fileno() in ready]:
            try:
                claim = greeting.read([each for each in claims if each not in found], job)
            except (OSError, _RefusedError) as error:
                self._refusals.add(greeting.peer, str(error))
                greeting.close()
            else:
                if claim is None:
                    continue
                found[claim] = greeting.connection
            greetings.remove(greeting)
        has_room = self._greet(greetings) if self._socket.fileno() in ready else True
        while greetings and not (has_room and greetings[0].is_in_time()):
            self._refusals.add(greetings[0].peer, "it has not proved in time that it belongs to the job")
            greetings.popleft().close()
            has_room = True
        return found

    def _forget_greetings(self) -> None:
        self._refusals.say()
        while self._greetings:
            self._greetings.popleft().close()

    def _greet(self, greetings: "deque[_Greeting]") -> bool:
        """Accept a connection, if there is one, and send it a nonce; return whether there is room for another one."""
        try:
            connection, address = self._socket.accept()
        except OSError as error:  # it is gone already, or this process may have no more descriptors
            return error.errno not in (errno.EMFILE, errno.ENFILE)
        greetings.append(_Greeting(connection, f"{address[0]}:{address[1]}"))
        with contextlib.suppress(OSError):  # it is gone: that shows when it is read
            connection.send(_MAGIC + greetings[-1].nonce)  # a new connection has room for so much
        return len(greetings) <= _MOST_GREETINGS


class _Refusals:
    """Says who was refused: of the first at once, of the others how many they were, now and then."""

    def __init__(self) -> None:
        self._unsaid = 0
        self._last = ""
        self._said_s = -_SAY_S

    def add(self, peer: str, reason: str) -> None:
        """Note that `peer` was refused."""
        self._unsaid += 1
        self._last = f"{peer}: {reason}"
        if time.monotonic() - self._said_s >= _SAY_S:
            self.say()

    def say(self) -> None:
        """Say what has not been said yet."""
        if self._unsaid:
            many = "a connection from" if self._unsaid == 1 else f"{self._unsaid} connections, the last from"
            log.warning("refused %s %s", many, self._last)
            self._unsaid, self._said_s = 0, time.monotonic()


class _RefusedError(Exception):
    """A connection does not belong to the job."""


class _Greeting:
    """A connection that has not proved yet that it belongs to the job."""

    def __init__(self, connection: socket.socket, peer: str) -> None:
        connection.setblocking(False)
        self.connection = connection
        self.peer = peer
        self.nonce = os.urandom(_NONCE_BYTES)
        self._deadline_s = time.monotonic() + _GREETING_S
        self._answer = b""

    def is_in_time(self) -> bool:
        """Return whether it may still prove itself."""
        return time.monotonic() < self._deadline_s

    def close(self) -> None:
        """End the connection."""
        self.connection.close()

    def read(self, expected: Collection[Claim], job: Pass) -> Claim | None:
        """Return the claim once it is proved, None while that is still to come.

        Raises:
            _RefusedError: it is not proved, or not `expected`.
            OSError: the connection is broken.
        """
        size = _CLAIM.size + _NONCE_BYTES + _PROOF_BYTES
        try:
            data = self.connection.recv(size - len(self._answer))
        except BlockingIOError:
            return None
        self._answer += data
        if not data:
            raise _RefusedError("it has ended in the middle of the handshake")
        if len(self._answer) < size:
            return None
        packed, proof = self._answer[: _CLAIM.size], self._answer[-_PROOF_BYTES:]
        nonces = self.nonce + self._answer[_CLAIM.size : -_PROOF_BYTES]
        claim, problem = Claim(*_CLAIM.unpack(packed)), ""
        if not hmac.compare_digest(proof, job.proof(b"dials", packed, nonces)):
            problem = "it has another secret, or belongs to another job"
        elif claim not in expected:
            problem = f"rank {claim.source} is not expected, or here already"
        self.connection.send(_REFUSAL if problem else job.proof(b"accepts", packed, nonces))
        if problem:
            raise _RefusedError(problem)
        return claim


def dial(address: tuple[str, int], claim: Claim, job: Pass, deadline_s: float, who: str = "") -> socket.socket:
    """Return a connection to `who`, by default the rank of the claim, that listens at `address`, or will soon.

    Raises:
        LaunchError: nobody listens there, or it is not of this job.
    """
    where, begin_s = f"{who or f'rank {claim.dest}'} at {address[0]}:{address[1]}", time.monotonic()
    problem = "nobody listens there"
    while (limit_s := deadline_s - time.monotonic()) > 0:
        try:
            connection = socket.create_connection(address, limit_s)
        except OSError as error:
            problem = str(error)
            time.sleep(_RETRY_S)
            continue
        try:
            # A port at which nobody listens yet may have been given to this side too, which then meets itself.
            connection.settimeout(min(limit_s, _GREETING_S))
            if connection.getsockname() != connection.getpeername() and _introduce(connection, claim, job, where):
                return connection
        except OSError as error:
            problem = str(error)
        except BaseException:
            connection.close()
            raise
        connection.close()
        time.sleep(_RETRY_S)
    raise LaunchError(f"{where} cannot be reached within {time.monotonic() - begin_s:.0f} s: {problem}")


def _introduce(connection: socket.socket, claim: Claim, job: Pass, where: str) -> bool:
    """Prove what this rank is, and have it proved what the other one is; return False if that should be tried again."""
    greeting = _receive(connection, len(_MAGIC) + _NONCE_BYTES)
    if not greeting:
        return False  # it has made way for others
    if len(greeting) < len(_MAGIC) + _NONCE_BYTES or not greeting.startswith(_MAGIC):
        raise LaunchError(f"what answers for {where} is not disttrain")
    packed = _CLAIM.pack(*claim)
    own_nonce = os.urandom(_NONCE_BYTES)
    nonces = greeting[len(_MAGIC) :] + own_nonce
    connection.sendall(packed + own_nonce + job.proof(b"dials", packed, nonces))
    answer = _receive(connection, _PROOF_BYTES)
    if not answer:
        return False
    if answer == _REFUSAL:
        raise LaunchError(f"{where} has refused rank {claim.source}: it has another secret, or belongs to another job")
    if not hmac.compare_digest(answer, job.proof(b"accepts", packed, nonces)):
        raise LaunchError(f"what answers for {where} does not know the job's secret")
    return True


def _ready(connections: Iterable[socket.socket], wait_ms: int) -> set[int]:
    """Return the descriptors of those of `connections` that can be read, after waiting `wait_ms` for one."""
    poll = select.poll()
    for connection in connections:
        poll.register(connection, select.POLLIN)
    return {number for number, _ in poll.poll(wait_ms)}


def _receive(connection: socket.socket, size: int) -> bytes:
    """Return `size` bytes, fewer where the other side has ended."""
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            break
        data += part
    return data


def _send_json(peer: socket.socket, value: Any) -> None:
    data = json.dumps(value).encode()
    peer.settimeout(JOIN_S)
    peer.sendall(_LENGTH.pack(len(data)) + data)


def _receive_json(peer: socket.socket, most_bytes: int) -> Any:
    peer.settimeout(JOIN_S)
    header = _receive(peer, _LENGTH.size)
    size = _LENGTH.unpack(header)[0] if len(header) == _LENGTH.size else 0
    if size > most_bytes:
        raise LaunchError(f"a rank announces {size} bytes at the rendezvous, expected at most {most_bytes}")
    data = _receive(peer, size)
    if not size or len(data) < size:
        raise LaunchError("a rank has ended during the rendezvous")
    return json.loads(data)
