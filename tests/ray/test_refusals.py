"""What Ray cannot start is refused, in half a minute, with what was asked and what is there."""

import socket
import time

import psutil
import pytest

from tests.ray.test_run import run

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["-o", "gpus=1"], "asked for 2 CPUs, 2 GPUs; there are"),
        (["--address", "127.0.0.1:1"], "no Ray cluster answers at '127.0.0.1:1': "),
        (["--address", "auto"], "no Ray cluster answers at 'auto'"),
        (["--address", "nowhere"], "no Ray cluster answers at 'nowhere'"),
        (["-o", "placement=TIGHT"], "placement=TIGHT: expected one of PACK, SPREAD"),
        (["-o", "cpus=many"], "cpus=many: expected how many each worker has"),
        (["-o", "nodes=2"], "unknown option of --launcher ray: 'nodes'"),
        (["-o", "cpus"], "'cpus': expected NAME=VALUE"),
        (["--transport", "mpi"], "can have no MPI"),
    ],
)
def test_what_ray_cannot_start_is_refused_in_half_a_minute(program, options, reason):
    if "auto" in options and any("gcs_server" in each.info["name"] for each in psutil.process_iter(["name"])):
        pytest.skip("a Ray cluster runs on this machine, which `auto` finds")
    refused(program, options, reason)


def refused(program, options, reason):
    begin_s = time.monotonic()
    done = run(program, "open('started', 'w')", 2, *options)
    assert done.exit_code == 2
    assert reason in done.err
    assert "Traceback" not in done.err
    assert "disttrain: a rank" not in done.err
    assert not (program.folder / "started").exists()
    assert done.time_s - begin_s < 60  # it says so in 30; the machine may be slow


def test_a_cluster_that_has_another_token_or_too_little_room_is_named(program, nodes):
    address, _ = nodes(1)
    words = "asked for 2 CPUs, 0 GPUs; there are 1 CPUs on 1 node(s), of which 1 CPUs are free"
    refused(program, ["--address", address], words)
    refused(program, ["--address", address, "-o", "gpus=1"], "asked for 2 CPUs, 2 GPUs; there are 1 CPUs, 0 GPUs on 1")
    mode, path = program.env["RAY_AUTH_MODE"], program.env["RAY_AUTH_TOKEN_PATH"]
    for other in ({"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": "0" * 64}, {"RAY_AUTH_MODE": mode}, {}):
        kept = {name: value for name, value in program.env.items() if not name.startswith("RAY_")}
        program.env = kept | other | {"HOME": str(program.folder)}  # where Ray looks for a token last
        refused(program, ["--address", address], f"the Ray cluster at '{address}' wants another token")
        refused(program, ["--address", "auto"], "the Ray cluster at 'auto' wants another token")
    program.env |= {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN_PATH": path}


def test_what_listens_and_is_no_cluster_is_refused(program):
    with socket.create_server(("", 0)) as silent:  # Ray takes 127.0.0.1 for the address of its node
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        refused(program, ["--address", address], f"no Ray cluster answers at '{address}': what listens there has said")


def test_a_script_that_is_not_on_a_node_is_refused(program, two_hosts):
    address = two_hosts(program.folder)
    reason = f"rank 1 does not find the script script.py in {program.folder}, on host other"
    refused(program, ["--address", address], reason)
