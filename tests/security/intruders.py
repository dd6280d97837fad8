"""Peers that do not belong to a job, and try to join, read, stall or crash it: sessions drawn at random."""

import contextlib
import random
import select
import socket
import struct
import time

from disttrain.comm import rendezvous
from disttrain.comm.rendezvous import Claim, Pass

GREETING_BYTES = len(rendezvous._MAGIC) + rendezvous._NONCE_BYTES
LIMIT_S = 60.0  # for an answer: a rank that waits for others does not answer yet

_TLS = bytes.fromhex("16030100c8010000c40303") + bytes(range(193))
_HTTP = b"GET / HTTP/1.1\r\nHost: rank0\r\nUpgrade: websocket\r\n\r\n" * 5
_PICKLE = b"\x80\x05\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R."


class JoinedError(Exception):
    """An intruder was given more than a greeting and a refusal."""


class Intruder:
    """Draws sessions, and counts them by kind.

    Args:
        seed: of what is drawn.
        job: of other jobs, and of earlier attempts at this one: with its secret, or with another.
        claims: what ranks of the job claim.
    """

    def __init__(self, seed: int, jobs: list[Pass], claims: list[Claim]) -> None:
        self.chance = random.Random(seed)
        self.counts: dict[str, int] = {}
        self.refused = 0  # connections, as nobody listens
        self._jobs, self._claims = jobs, claims
        self._overheard: list[bytes] = []

    def session(self, address: tuple[str, int]) -> None:
        """Connect to `address` and do harm, in a way that is drawn.

        Raises:
            JoinedError: the other side takes this for a rank.
        """
        kinds = (self._scan, self._reset, self._noise, self._protocol, self._forged, self._altered, self._replayed,
                 self._reflected, self._too_long, self._in_pieces, self._half_closed)  # fmt: skip
        kind = self.chance.choice(kinds)
        try:
            connection = socket.create_connection(address, LIMIT_S)
        except ConnectionRefusedError:
            self.refused += 1
            return
        with connection:
            self.counts[kind.__name__] = self.counts.get(kind.__name__, 0) + 1
            try:
                kind(connection)
            except OSError as error:
                if isinstance(error, TimeoutError):
                    raise  # any other: it was refused in the middle

    def _scan(self, connection: socket.socket) -> None:
        pass

    def _reset(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _noise(self, connection: socket.socket) -> None:
        self._say(connection, self.chance.randbytes(self.chance.choice([1, 12, 75, 76, 77, 300, 5000])))

    def _protocol(self, connection: socket.socket) -> None:
        self._say(connection, self.chance.choice([_HTTP, _TLS, _PICKLE * 10, b"\0" * 76, b"\xff" * 76]))

    def _forged(self, connection: socket.socket) -> None:
        """Prove to be of another job, or of an earlier attempt at this one."""
        self._say(connection, self._answer(connection, self.chance.choice(self._jobs)))

    def _altered(self, connection: socket.socket) -> None:
        answer = bytearray(self._answer(connection, self.chance.choice(self._jobs)))
        for _ in range(self.chance.randint(1, 4)):
            answer[self.chance.randrange(len(answer))] = self.chance.randrange(256)
        self._say(connection, bytes(answer))

    def _replayed(self, connection: socket.socket) -> None:
        """Say what was said in another session."""
        answer = self._answer(connection, self.chance.choice(self._jobs))
        self._overheard = [*self._overheard, answer][-50:]
        self._say(connection, self.chance.choice(self._overheard))

    def _reflected(self, connection: socket.socket) -> None:
        """Give back what the listener has said, as one's own nonce and proof."""
        greeting = rendezvous._receive(connection, GREETING_BYTES)
        self._say(connection, rendezvous._CLAIM.pack(*self.chance.choice(self._claims)) + greeting[-32:] * 2)

    def _too_long(self, connection: socket.socket) -> None:
        """Send as much as the other side takes: it must not keep it."""
        connection.settimeout(0.05)
        with contextlib.suppress(TimeoutError):
            connection.sendall(bytes(1 << 22))

    def _in_pieces(self, connection: socket.socket) -> None:
        for byte in self._answer(connection, self.chance.choice(self._jobs)):
            connection.sendall(bytes([byte]))
        self._listen(connection)

    def _half_closed(self, connection: socket.socket) -> None:
        connection.sendall(self._answer(connection, self.chance.choice(self._jobs))[: self.chance.randrange(76)])
        connection.shutdown(socket.SHUT_WR)
        self._listen(connection)

    def _answer(self, connection: socket.socket, job: Pass) -> bytes:
        """Return what a rank of `job` would answer to the greeting."""
        claim = rendezvous._CLAIM.pack(*self.chance.choice(self._claims))
        nonce = self.chance.randbytes(rendezvous._NONCE_BYTES)
        greeting = rendezvous._receive(connection, GREETING_BYTES)
        return claim + nonce + job.proof(b"dials", claim, greeting[len(rendezvous._MAGIC) :] + nonce)

    def _say(self, connection: socket.socket, data: bytes) -> None:
        connection.sendall(data)
        if self.chance.random() < 0.5:  # others do not wait for what comes
            self._listen(connection)

    def _listen(self, connection: socket.socket) -> None:
        connection.shutdown(socket.SHUT_WR)
        said = rendezvous._receive(connection, 1000)
        proof = said.removeprefix(said[:GREETING_BYTES]) if said.startswith(rendezvous._MAGIC) else said
        if proof not in (b"", rendezvous._REFUSAL):
            raise JoinedError(f"a session was answered by {proof!r}")


class SlowPeers(contextlib.AbstractContextManager):
    """Connections, each of which says one byte now and then, and is made again when it is ended."""

    def __init__(self, address: tuple[str, int], count: int) -> None:
        self._address, self._count = address, count
        self._connections: list[socket.socket] = []
        self._said_s = 0.0
        self.ended = 0

    def __exit__(self, *error: object) -> None:
        for connection in self._connections:
            connection.close()

    def go_on(self) -> None:
        """Say the next bytes, if it is time to; make up for what was ended."""
        if time.monotonic() - self._said_s < 0.2:
            return
        self._said_s = time.monotonic()
        with contextlib.suppress(ConnectionRefusedError):
            while len(self._connections) < self._count:
                self._connections.append(socket.create_connection(self._address, LIMIT_S))
        for connection in tuple(self._connections):
            try:
                connection.sendall(b"d")
                is_ended = self._has_ended(connection)
            except OSError:
                is_ended = True
            if is_ended:
                self.ended += 1
                connection.close()
                self._connections.remove(connection)

    @staticmethod
    def _has_ended(connection: socket.socket) -> bool:
        """Return whether the other side has hung up, or said more than its greeting."""
        while select.select([connection], [], [], 0)[0]:
            if not connection.recv(GREETING_BYTES):
                return True
        return False
