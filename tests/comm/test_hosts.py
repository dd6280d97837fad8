"""Jobs of several hosts, of which each shares memory among its ranks: simulated, in one process."""

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
