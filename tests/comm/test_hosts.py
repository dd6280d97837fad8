"""Jobs of several hosts, of which each shares memory among its ranks: simulated, in one process."""

import numpy as np
import pytest

from disttrain import env
from disttrain.comm import threads
from disttrain.errors import CommError
from disttrain.kernels.library import native
from tests.comm import claims

pytestmark = pytest.mark.timeout(60)

if native("start_all_reduce") is None:
    pytest.skip("no native kernels here: sums go by messages", allow_module_level=True)

# the host of each rank: alike, of unequal sizes, in turns, of one rank each, many
HOSTS = ["aabb", "aab", "abb", "abab", "ab", "aaabbc", "aaaabbbb"]
each_layout = pytest.mark.parametrize("hosts", HOSTS)


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(env, "costs_dir", lambda: tmp_path)


def on_hosts(hosts, function, *args):
    """Return what `function` returns on ranks of which each lives on the host that `hosts` has at its place."""

    def work(comm):
        comm.join_node(hosts[comm.rank])
        return function(comm, *args)

    return threads.run(len(hosts), work)


@each_layout
def test_ranks_of_a_host_form_a_node(hosts):
    def work(comm):
        return comm.local_rank, comm._node and list(comm._node.members), comm._nodes

    found = on_hosts(hosts, work)
    members = {host: [rank for rank, other in enumerate(hosts) if other == host] for host in hosts}
    for rank, host in enumerate(hosts):
        own = members[host]
        assert found[rank] == (own.index(rank), own if len(own) > 1 else None, list(members.values()))


@each_layout
def test_a_channel_knows_whether_its_ranks_are_on_one_host(hosts):
    def work(comm):
        channel = comm._channel("test", np.zeros(1))
        own = [rank for rank, host in enumerate(hosts) if host == hosts[comm.rank]]
        return channel.is_within_host, channel.among(own).is_within_host, comm.rank

    assert on_hosts(hosts, work) == [(len(set(hosts)) == 1, True, rank) for rank in range(len(hosts))]
    assert threads.run(2, lambda comm: comm._channel("test", np.zeros(1)).is_within_host) == [False, False]


@each_layout
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
def test_the_claims_hold_on_several_hosts(hosts, claim):
    on_hosts(hosts, claim)


@each_layout
@pytest.mark.parametrize("size", claims.SIZES)
def test_all_reduce_is_exact_on_several_hosts(hosts, size):
    def work(comm):
        for dtype in claims.DTYPES:
            for op in claims.OPS:
                claims.all_reduce_is_exact(comm, size, dtype, op)

    on_hosts(hosts, work)


@pytest.mark.parametrize("seed", range(3))
@each_layout
def test_pendings_interleave_on_several_hosts(hosts, seed):
    on_hosts(hosts, claims.pendings_interleave, seed)


@each_layout
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("place", ["window", "elsewhere", "either"])
def test_each_byte_leaves_a_node_once_and_not_once_per_rank(hosts, dtype, place):
    count = len(set(hosts))

    def work(comm):
        right = []
        for size in (5, 1000, 100_003):
            array = comm.allocate(size, dtype)
            if place == "elsewhere" or (place == "either" and comm.rank % 2):
                array = np.zeros(size, dtype)
            for op in claims.OPS:
                array[:] = claims.values((size,), dtype, comm.rank)
                before = comm.bytes_sent
                with claims.messages_cost(comm, claims.LONG):
                    comm.all_reduce(array, op)
                sent = comm.bytes_sent - before
                right.append(np.array_equal(array, claims.expected(comm, (size,), dtype, op)))
                everyone = comm.all_gather_json(sent)
                right.append(sum(everyone) == 2 * (count - 1) * array.nbytes)
                # a chunk stays at home in each half of the ring, up to one element longer than the mean
                of_node = [sum(everyone[rank] for rank in ranks) for ranks in comm._nodes]
                right += [each <= 2 * (count - 1) * array.nbytes / count + 2 * array.itemsize for each in of_node]
        claims.holds(comm, *right)

    on_hosts(hosts, work)


@pytest.mark.parametrize("size", [50, 5000, 300_000])
def test_bits_are_the_same_on_all_hosts(size):
    def work(comm):
        array = np.random.default_rng(comm.rank).standard_normal(size).astype(np.float32)
        window = comm.allocate(size)
        window[:] = array
        return comm.all_reduce(array).tobytes(), comm.all_reduce(window).tobytes()

    results = on_hosts("aaabbc", work)
    assert len({bits for pair in results for bits in pair}) == 1


def test_many_sums_in_flight_on_several_hosts():
    def work(comm):
        sizes = [(7 * i * i + i) % 60_000 for i in range(30)]
        arrays = [comm.allocate(size) if i % 3 else np.zeros(size, np.float32) for i, size in enumerate(sizes)]
        for turn in range(2):
            for array in arrays:
                array[:] = claims.values(array.shape, "float32", comm.rank)
            pendings = [comm.start_all_reduce(array) for array in arrays]
            order = np.random.default_rng(comm.rank + turn).permutation(len(pendings))
            for at in order:
                pendings[at].advance()
            for at in order:
                pendings[at].wait()
            claims.holds(comm, *(np.array_equal(a, claims.expected(comm, a.shape, "float32")) for a in arrays))

    on_hosts("aabcb", work)


def test_ranks_of_a_node_that_differ_are_named_as_in_the_job():
    def work(comm):
        comm.all_reduce(np.zeros(6 if comm.rank == 3 else 5))

    with pytest.raises(CommError, match=r"rank [012]: .* of \(5,\) float64, .*rank 3: .* of \(6,\) float64"):
        on_hosts("abab", work)


def test_waiting_for_a_rank_of_this_host_that_has_ended_names_it():
    def work(comm):
        if comm.rank == 1:
            comm.all_reduce(np.zeros(5))

    with pytest.raises(CommError, match="rank 3 has left the job"):
        on_hosts("abab", work)


def test_errors_of_a_node_name_the_ranks_of_the_job():
    def allocates_more(comm):
        if comm.rank in (1, 3):
            comm.allocate(10 + comm.rank)

    with pytest.raises(CommError, match="rank 1 44 bytes, rank 3 52"):
        on_hosts("abab", allocates_more)


def test_one_node_may_allocate_while_another_does_not():
    # what a rank does with its node alone must not shift what it does with all
    def work(comm):
        for _ in range(comm.rank % 2):
            comm.allocate(100)
        claims.all_reduce_is_exact(comm, 1000, "float32", "sum")

    on_hosts("abab", work)


def test_the_environment_names_the_host():
    assert env.host({"DISTTRAIN_HOST": "first"}) == "first"
    assert env.host({}) == env.host({"DISTTRAIN_HOST": ""}) != env.host({"DISTTRAIN_HOST": "first"})


def test_hosts_without_a_name_of_their_own_differ_by_start_and_name(monkeypatch):
    here = env.host({})
    monkeypatch.setattr(env.platform, "node", lambda: "elsewhere")
    named = env.host({})
    monkeypatch.setattr(env, "_boot_id", lambda: "another start")
    assert len({here, named, env.host({})}) == 3
