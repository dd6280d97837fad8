"""Ranks over TCP, here threads of one process, each with its own sockets; and peers that do not belong to the job."""

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest

from disttrain import env
from disttrain.comm import rendezvous, tcp
from disttrain.comm.rendezvous import Claim, Listener, Pass, dial
from disttrain.errors import CommError, ConfigError, LaunchError
from tests.comm import claims

pytestmark = pytest.mark.timeout(60)

SECRET = b"known to the ranks of this job alone"
each_world_size = pytest.mark.parametrize("world_size", [1, 2, 3, 4])


def place(rank, world_size):
    return env.Place(launcher="", rank=rank, world_size=world_size, local_rank=rank, local_size=world_size)


def in_threads(world_size, function):
    """Return what ``function(place)`` returns on each rank."""
    with ThreadPoolExecutor(world_size) as pool:
        futures = [pool.submit(function, place(rank, world_size)) for rank in range(world_size)]
        return [future.result() for future in futures]


def exchange_among(world_size):
    """Return a function that returns the exchange of a rank, among threads."""
    values, barrier = [None] * world_size, threading.Barrier(world_size, timeout=30)

    def of(rank):
        def exchange(value):
            values[rank] = value
            barrier.wait()
            found = [*values]
            barrier.wait()
            return found

        return exchange

    return of


def over_tcp(world_size, function, *args, secret=SECRET):
    """Return what ``function(comm, *args)`` returns on each rank; a rank that raises ends without a word."""
    exchange = exchange_among(world_size)

    def work(place):
        comm = tcp.join(place, exchange(place.rank), secret, "127.0.0.1")
        try:
            result = function(comm, *args)
            comm.leave()
            return result
        finally:
            comm.close()

    return in_threads(world_size, work)


def connections(status=None):
    found = psutil.Process().net_connections(kind="tcp")
    return [each for each in found if status in (None, each.status)]


@pytest.fixture(autouse=True)
def _nothing_is_left():
    before, threads = len(connections()), threading.active_count()
    yield
    assert len(connections()) == before
    assert threading.active_count() <= threads


@each_world_size
@pytest.mark.parametrize("size", claims.SIZES)
def test_all_reduce_is_exact(world_size, size):
    def every_dtype(comm):
        for dtype in claims.DTYPES:
            for op in claims.OPS:
                claims.all_reduce_is_exact(comm, size, dtype, op)

    over_tcp(world_size, every_dtype)


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_reduce_of_ten_million_elements_is_exact(world_size):
    over_tcp(world_size, claims.all_reduce_is_exact, 10_000_000, "float32", "sum")


@each_world_size
@pytest.mark.parametrize(
    "claim",
    [
        claims.all_reduce_of_truths,
        claims.all_reduce_gives_the_same_bits,
        claims.all_reduce_of_views,
        claims.broadcast_from_every_root,
        claims.json_of_every_length,
        claims.messages_pass_around,
        claims.pendings_need_no_wait,
        claims.a_pending_sum_moves_while_a_message_is_awaited,
    ],
)
def test_on_any_number_of_ranks(world_size, claim):
    over_tcp(world_size, claim)


@each_world_size
def test_all_reduce_counts_its_bytes_and_messages(world_size):
    def every_size(comm):
        for size in claims.SIZES:
            claims.all_reduce_of_long_arrays_counts_its_bytes(comm, size, "float32")
            claims.all_reduce_of_short_arrays_counts_its_messages(comm, size, "float32")

    over_tcp(world_size, every_size)


@each_world_size
@pytest.mark.parametrize("shape", [(0,), (3,), (13, 2, 2), (70_001, 5)])
def test_rows_and_stacks(world_size, shape):
    over_tcp(world_size, claims.reduce_scatter_gives_each_its_rows, shape, "sum")
    over_tcp(world_size, claims.all_gather_stacks, shape)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_pendings_interleave(world_size, seed):
    over_tcp(world_size, claims.pendings_interleave, seed)


def test_control_messages_pass_messages_that_nobody_has_asked_for():
    def work(comm):
        others = [rank for rank in range(3) if rank != comm.rank]
        unasked = [comm._isend(np.ones(10**6), rank, 1) for rank in others]
        for rank in others:
            comm._tell(rank, f"from {comm.rank} to {rank}".encode())
        told = []
        while len(told) < 2:
            told += filter(None, [comm._told()])
        arrays = [np.zeros(10**6) for _ in others]
        for request in [comm._irecv(array, rank, 1) for array, rank in zip(arrays, others, strict=True)] + unasked:
            request.wait()
        return sorted(told), all(array.all() for array in arrays)

    expected = [[(other, b"from %d to %d" % (other, rank)) for other in range(3) if other != rank] for rank in range(3)]
    assert over_tcp(3, work) == [(told, True) for told in expected]


def test_once_all_have_come_nobody_listens():
    def work(comm):
        comm.barrier()
        listening = len(connections(psutil.CONN_LISTEN))
        comm.barrier()
        return listening

    assert over_tcp(3, work) == [0, 0, 0]


def test_a_rank_that_waits_sleeps():
    def work(comm):
        comm.barrier()
        used = time.thread_time()
        if comm.rank == 0:
            time.sleep(0.5)
        comm.barrier()
        return time.thread_time() - used

    assert max(over_tcp(3, work)) < 0.1


# --- ranks that end ---


def errors_of_the_others(world_size, ends, goes_on):
    """Return what `goes_on` raises on ranks but the last, of which `ends` is called: text, or None."""

    def work(comm):
        comm.barrier()
        if comm.rank == world_size - 1:
            ends(comm)
            return None
        try:
            goes_on(comm)
        except CommError as error:
            return str(error)
        return None

    return over_tcp(world_size, work)[:-1]


WAITS = {
    "a sum": lambda comm: comm.all_reduce(np.ones(10)),
    "a long sum": lambda comm: comm.all_reduce(np.ones(10**6)),
    "a barrier": lambda comm: comm.barrier(),
    "a message from another rank": lambda comm: comm.recv(np.ones(3), (comm.rank + 1) % 3),
    "a message to it": lambda comm: comm.send(np.ones(10**7), 3) if comm.rank == 0 else comm.barrier(),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_a_rank_that_is_lost_is_named_by_all_others_wherever_they_wait(wait):
    """In a ring of four, only two have to do with the lost one."""
    errors = errors_of_the_others(4, lambda comm: (time.sleep(0.1), comm.close()), wait)
    assert all(error.startswith("rank 3 has ended without a word") for error in errors), errors


def test_a_rank_that_leaves_is_named_by_those_that_wait_for_it():
    errors = errors_of_the_others(3, lambda comm: comm.leave(), lambda comm: comm.recv(np.ones(3), 2))
    for rank, error in enumerate(errors):
        assert error.startswith("rank 2 has left the job, its script has ended or called sys.exit()"), errors
        assert f"and rank {rank} waits for it in recv (float64, 24 bytes)" in error, errors


def test_a_rank_may_leave_while_others_go_on():
    def goes_on(comm):
        comm.send(np.full(10**6, comm.rank), 1 - comm.rank) if comm.rank else comm.recv(np.zeros(10**6), 1)
        time.sleep(0.2)
        comm.recv(np.zeros(10**6), 1) if comm.rank == 0 else comm.send(np.zeros(10**6), 0)

    assert errors_of_the_others(3, lambda comm: comm.leave(), goes_on) == [None, None]


def test_what_was_sent_before_a_rank_left_still_arrives():
    size = 100_000
    is_sent = threading.Event()

    def work(comm):
        if comm.rank == 1:
            is_sent.wait(10)
            comm.send(np.arange(size, dtype=np.int64), 0)
            return None
        comm.isend(np.ones(10), 1)  # which nobody there has read when it leaves
        is_sent.set()
        time.sleep(0.2)
        return int(comm.recv(np.zeros(size, np.int64), 1).sum())

    assert over_tcp(2, work)[0] == size * (size - 1) // 2


# --- peers that do not belong to the job ---

JOB = Pass(secret=SECRET, job="this one")


def scan(address):
    socket.create_connection(address).close()


def garbage(address):
    with socket.create_connection(address) as peer:
        peer.sendall(b"GET / HTTP/1.1\r\nHost: rank0\r\n\r\n" * 10)
        peer.recv(1000)


def reset(address):
    with socket.create_connection(address) as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def wrong_secret(address):
    with pytest.raises(LaunchError, match="has refused rank 1: it has another secret, or belongs to another job"):
        dial(address, Claim(1, 0, 0), Pass(secret=b"guessed", job=JOB.job), time.monotonic() + 10)


def another_job(address):
    with pytest.raises(LaunchError, match="has refused rank 1"):
        dial(address, Claim(1, 0, 0), Pass(secret=SECRET, job="another one"), time.monotonic() + 10)


def another_rank(address):
    with pytest.raises(LaunchError, match="has refused rank 7"):
        dial(address, Claim(7, 0, 0), JOB, time.monotonic() + 10)


def its_own_proof_back(address):
    """Ask the listener for its proof of one connection, to give it as one's own in another: of another role."""
    with socket.create_connection(address) as peer:
        greeting = rendezvous._receive(peer, 48)
        claim, nonce = rendezvous._CLAIM.pack(1, 0, 0), b"n" * 32
        peer.sendall(claim + nonce + JOB.proof(b"accepts", claim, greeting[16:] + nonce))
        assert rendezvous._receive(peer, 100) == rendezvous._REFUSAL


def a_proof_that_was_overheard(address):
    claim, nonce = rendezvous._CLAIM.pack(1, 0, 0), b"n" * 32
    with socket.create_connection(address) as peer:
        overheard = claim + nonce + JOB.proof(b"dials", claim, rendezvous._receive(peer, 48)[16:] + nonce)
    with socket.create_connection(address) as peer:
        rendezvous._receive(peer, 48)
        peer.sendall(overheard)
        assert rendezvous._receive(peer, 100) == rendezvous._REFUSAL


HOSTILE = [
    scan, garbage, reset, wrong_secret, another_job, another_rank, its_own_proof_back, a_proof_that_was_overheard,
]  # fmt: skip


@contextlib.contextmanager
def accepting(claims):
    """Listen for `claims` in a thread; yield the address and the future of what has come."""
    with Listener("127.0.0.1") as listener, ThreadPoolExecutor(1) as pool:
        yield listener.address, pool.submit(listener.accept, claims, JOB, time.monotonic() + 30)


def comes_through(address):
    return dial(address, Claim(1, 0, 0), JOB, time.monotonic() + 10)


@pytest.mark.parametrize("attack", HOSTILE)
def test_who_does_not_belong_to_the_job_is_refused_and_logged_and_those_who_do_come_in(attack, caplog):
    with accepting([Claim(1, 0, 0)]) as (address, coming):
        attack(address)
        with comes_through(address) as here:
            (there,) = coming.result().values()
            with there:
                here.sendall(b"hello")
                assert there.recv(100) == b"hello"
    assert any("refused a connection from 127.0.0.1:" in record.getMessage() for record in caplog.records)


def test_half_open_and_slow_peers_hold_nobody_up_and_are_cut_off(caplog, monkeypatch):
    monkeypatch.setattr(rendezvous, "_GREETING_S", 0.3)
    with accepting([Claim(1, 0, 0), Claim(2, 0, 0)]) as (address, coming):
        with socket.create_connection(address) as silent, socket.create_connection(address) as slow:
            slow.sendall(b"x")
            here = comes_through(address)
            for peer in (silent, slow):
                peer.settimeout(10)
                assert len(rendezvous._receive(peer, 100)) == 48  # the greeting, and then the end
        with here, dial(address, Claim(2, 0, 0), JOB, time.monotonic() + 10):
            for there in coming.result().values():
                there.close()
    texts = [record.getMessage() for record in caplog.records]
    assert sum("it has not proved in time" in text for text in texts) == 2


def test_any_number_of_half_open_connections_leaves_room_for_a_rank(monkeypatch):
    monkeypatch.setattr(rendezvous, "_MOST_GREETINGS", 10)
    with accepting([Claim(1, 0, 0)]) as (address, coming), contextlib.ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(socket.create_connection(address))
        with comes_through(address):
            (there,) = coming.result().values()
            there.close()


def test_a_scan_is_told_in_few_words(caplog):
    with accepting([Claim(1, 0, 0)]) as (address, coming):
        for _ in range(50):
            scan(address)
        with comes_through(address):
            (there,) = coming.result().values()
            there.close()
    first, last = [record.getMessage() for record in caplog.records]
    assert first.startswith("refused a connection from 127.0.0.1:")
    assert last.startswith("refused 49 connections, the last from 127.0.0.1:")


def test_a_rank_that_has_to_make_way_tries_again():
    def serve(server):
        for has_room in (False, True):
            peer, _ = server.accept()
            with peer:
                greeting = rendezvous._Greeting(peer, "rank 1")
                peer.setblocking(True)
                peer.sendall(rendezvous._MAGIC + greeting.nonce)
                claim = rendezvous._receive(peer, 76)
                proof = JOB.proof(b"accepts", claim[:12], greeting.nonce + claim[12:44])
                peer.sendall(proof if has_room else b"")

    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        served = pool.submit(serve, server)
        comes_through(server.getsockname()).close()
        served.result()


def test_without_descriptors_the_oldest_makes_way():
    """Of 40 that a process may have, idle peers hold all: a rank comes in nevertheless."""
    text = f"""
import resource, socket, threading, time
from disttrain.comm.rendezvous import Claim, Listener, Pass, dial
job = Pass(secret={SECRET!r}, job="this one")
listener = Listener("127.0.0.1")
print(listener.address[1], flush=True)
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
listener.accept([Claim(1, 0, 0)], job, time.monotonic() + 30)
"""
    process = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        address = ("127.0.0.1", int(process.stdout.readline()))
        with contextlib.ExitStack() as stack:
            for _ in range(100):
                stack.enter_context(socket.create_connection(address))
            comes_through(address).close()
            _, said = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, said
    assert "it has not proved in time" in said


def test_proofs_are_compared_in_constant_time(monkeypatch):
    compared = []
    real = rendezvous.hmac.compare_digest
    monkeypatch.setattr(rendezvous.hmac, "compare_digest", lambda a, b: compared.append(len(a)) or real(a, b))
    with accepting([Claim(1, 0, 0)]) as (address, coming), comes_through(address):
        (there,) = coming.result().values()
        there.close()
    assert compared == [32, 32]  # on both sides


def test_of_two_that_claim_to_be_one_rank_the_second_is_refused():
    with accepting([Claim(1, 0, 0), Claim(2, 0, 0)]) as (address, coming):
        with comes_through(address), pytest.raises(LaunchError, match="has refused rank 1"):
            comes_through(address)
        with dial(address, Claim(2, 0, 0), JOB, time.monotonic() + 10):
            assert sorted(claim.source for claim in coming.result()) == [1, 2]
        for there in coming.result().values():
            there.close()


@pytest.mark.parametrize(
    ("says", "problem"),
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n" + b"x" * 100, "is not disttrain"),
        (rendezvous._MAGIC + b"n" * 32 + b"p" * 32, "does not know the job's secret"),
    ],
)
def test_who_listens_must_belong_to_the_job_too(says, problem):
    def serve(server):
        with server.accept()[0] as peer:
            peer.sendall(says)
            with contextlib.suppress(OSError):
                while peer.recv(1000):
                    pass

    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        served = pool.submit(serve, server)
        with pytest.raises(LaunchError, match=f"what answers for rank 0 at 127.0.0.1:.*{problem}"):
            comes_through(server.getsockname())
        served.result()


def test_who_listens_cannot_give_the_proof_of_the_other_side_as_its_own():
    def serve(server):
        with server.accept()[0] as peer:
            peer.sendall(rendezvous._MAGIC + b"n" * 32)
            peer.sendall(rendezvous._receive(peer, 76)[-32:])

    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        served = pool.submit(serve, server)
        with pytest.raises(LaunchError, match="does not know the job's secret"):
            comes_through(server.getsockname())
        served.result()


def test_ranks_that_have_not_come_are_named():
    with Listener("127.0.0.1") as listener, pytest.raises(LaunchError, match=r"rank\(s\) 1, 3 have not come"):
        listener.accept([Claim(3, 0, 0), Claim(1, 0, 0), Claim(1, 0, 1)], JOB, time.monotonic() + 0.1)


def test_ranks_with_different_secrets_do_not_join(monkeypatch):
    monkeypatch.setattr(rendezvous, "JOIN_S", 1.0)
    exchange = exchange_among(2)

    def work(place):
        with pytest.raises(LaunchError) as caught:
            tcp.join(place, exchange(place.rank), SECRET + bytes([place.rank]), "127.0.0.1")
        return str(caught.value)

    first, second = in_threads(2, work)
    assert "rank(s) 1 have not come" in first
    assert "has refused rank 1: it has another secret" in second


# --- the rendezvous ---


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize("attack", [garbage, wrong_secret])
def test_an_exchange_through_rank_0_whoever_else_connects(attack):
    port = free_port()

    def work(place):
        exchange = rendezvous.exchange_at(f"127.0.0.1:{port}", place, SECRET)
        if place.rank == 1:
            while True:  # rank 0 may not listen yet
                try:
                    attack(("127.0.0.1", port))
                    break
                except ConnectionRefusedError:
                    time.sleep(0.01)
        return exchange([place.rank, "ü" * 100])

    assert in_threads(3, work) == [[[rank, "ü" * 100] for rank in range(3)]] * 3


def test_what_a_rank_announces_at_the_rendezvous_has_a_limit():
    here, there = socket.socketpair()
    with here, there:
        here.sendall(struct.pack("<I", 5000))
        with pytest.raises(LaunchError, match="announces 5000 bytes at the rendezvous, expected at most 4096"):
            rendezvous._receive_json(there, 4096)


@pytest.mark.parametrize("address", ["", "host", "host:", ":80", "host:port"])
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(ConfigError, match="expected host:port"):
        rendezvous.parsed(address)


def test_an_address_of_ipv6_stands_in_brackets():
    assert rendezvous.parsed("[::1]:80") == ("::1", 80)


def test_the_secret_comes_from_the_environment_or_a_file_that_others_cannot_read(monkeypatch, tmp_path):
    file = tmp_path / "secret"
    file.write_text("sixteen characters in a file\n")
    file.chmod(0o644)
    monkeypatch.delenv(env.SECRET, raising=False)
    monkeypatch.setenv(env.SECRET_FILE, str(file))
    with pytest.raises(LaunchError, match="others can read"):
        rendezvous.secret()
    file.chmod(0o600)
    assert rendezvous.secret() == b"sixteen characters in a file"
    monkeypatch.setenv(env.SECRET, "too short")
    with pytest.raises(LaunchError, match="at least 16 characters"):
        rendezvous.secret()


def test_a_rank_listens_where_it_is_told_to_else_where_the_rendezvous_is(monkeypatch):
    monkeypatch.delenv(env.INTERFACE, raising=False)
    assert rendezvous.own_host() == "127.0.0.1"
    assert rendezvous.own_host("127.0.0.1:80") == "127.0.0.1"
    monkeypatch.setenv(env.INTERFACE, "lo")
    assert rendezvous.own_host("10.0.0.1:80") == "127.0.0.1"
    monkeypatch.setenv(env.INTERFACE, "127.0.0.2")
    assert rendezvous.own_host("10.0.0.1:80") == "127.0.0.2"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "0"])
def test_nobody_listens_at_all_addresses(host):
    with pytest.raises(LaunchError, match="which is all addresses of its host"):
        Listener(host)


# --- processes without a launcher of ours ---

JOIN = "import os, signal, sys, time, numpy as np, disttrain as dt\ncomm = dt.init('tcp')\n"


def processes(world_size, text, **environ):
    """Start `world_size` processes as a scheduler would, each a host of its own; return their codes and errors."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("DISTTRAIN_", "PMI", "SLURM_"))}
    clean |= {env.RENDEZVOUS: f"127.0.0.1:{free_port()}", env.SECRET: SECRET.decode(), **environ}
    started = []
    for rank in range(world_size):
        of_rank = {"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": str(world_size), env.HOST: f"host {rank}"}
        command = [sys.executable, "-c", JOIN + text]
        started.append(subprocess.Popen(command, env=clean | of_rank, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=50)[1] for process in started]
    return [process.returncode for process in started], errors


def test_processes_of_another_launcher_meet_at_the_rendezvous():
    codes, errors = processes(3, "assert comm.all_reduce(np.ones(5))[0] == 3; assert comm.bytes_sent > 0")
    assert (codes, errors) == ([0, 0, 0], ["", "", ""])


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "os._exit(0)", "1 / 0"])
def test_a_process_that_ends_is_named_by_all_others(end):
    text = f"comm.barrier()\nif comm.rank == 2:\n    time.sleep(0.2)\n    {end}\ncomm.all_reduce(np.ones(10**5))"
    codes, errors = processes(4, text)
    assert all(codes[rank] == 1 for rank in (0, 1, 3))
    assert all("CommError: rank 2 has ended without a word" in errors[rank] for rank in (0, 1, 3)), errors


def test_a_child_of_a_rank_does_not_keep_its_connections_open(tmp_path):
    text = f"""
seen = {str(tmp_path / "seen")!r}
if comm.rank == 1 and os.fork():
    os.kill(os.getpid(), signal.SIGKILL)
if comm.rank == 1:
    begin = time.monotonic()
    while not os.path.exists(seen):
        time.sleep(0.01)
        if time.monotonic() - begin > 20: sys.exit("nobody has seen that its parent was killed")
    os._exit(0)
try:
    comm.barrier()
finally:
    open(seen, "w")
"""
    codes, errors = processes(2, text)
    assert codes == [1, -signal.SIGKILL]
    assert "rank 1 has ended without a word" in errors[0]
    assert errors[1] == ""


def test_without_a_rendezvous_the_transport_says_how_to_get_one():
    codes, errors = processes(2, "", **{env.RENDEZVOUS: ""})
    assert codes == [1, 1]
    assert "disttrain run --launcher local --transport tcp -n N script.py" in errors[0].splitlines()[-1]


def test_without_a_secret_the_transport_says_where_to_put_it():
    codes, errors = processes(2, "", **{env.SECRET: ""})
    assert codes == [1, 1]
    assert "in DISTTRAIN_SECRET, or in a file of mode 0600" in errors[0].splitlines()[-1]
