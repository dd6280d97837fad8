"""Clusters of several nodes: other hosts are told of like this one, and a node that is lost ends no job."""

import re
import signal
import time
from pathlib import Path

import pytest

from tests.ray.conftest import remove_last
from tests.ray.test_run import HOST, JOIN

pytestmark = pytest.mark.timeout(600)


def test_what_happens_on_another_host_is_told_like_what_happens_here(program, two_hosts):
    text = JOIN + (
        "import socket\n"
        "comm.all_reduce(np.ones(3))\n"
        "print('on', socket.gethostname(), os.environ['DISTTRAIN_LOCAL_SIZE'], flush=True)\n"
        "if comm.rank == 1 and sys.argv[1] == 'raises': raise ValueError('only here')\n"
        "if comm.rank == 1 and sys.argv[1] == 'dies': os.kill(os.getpid(), signal.SIGKILL)\n"
        "if sys.argv[1] == 'waits':\n"
        "    try:\n"
        "        open(f'here.{comm.rank}', 'w').write('yes')\n"
        "        time.sleep(60)\n"
        "    except KeyboardInterrupt:\n"
        "        open(f'told.{comm.rank}', 'w').write('yes')\n"
        "comm.barrier()"
    )
    command = ("run", "-n", "2", "--launcher", "ray", "--address", two_hosts(), program.script(text))
    done = program.run(*command, "works")
    assert done.exit_code == 0, done.err
    assert f"[0] on {HOST} 1\n" in done.out
    assert re.search(r"^\(rank 1 pid=\d+.*\) on other 1$", done.out, re.MULTILINE)
    done = program.run(*command, "raises")
    assert done.exit_code == 1
    assert "disttrain: rank 1 of 2 failed first, on host other, exit code 1:\nTraceback" in done.err
    assert "\nValueError: only here\nrank 1 of 2, host other\nMeanwhile rank 0: " in done.err
    done = program.run(*command, "dies")
    assert done.exit_code == 128 + signal.SIGKILL
    assert (
        "disttrain: rank 1 of 2 failed first, on host other, exit code 137:\nrank 1 of 2, on host other, pid"
        in done.err
    )
    started = program.start(*command, "waits")
    for rank in range(2):
        program.await_file(f"here.{rank}")
    started.send_signal(signal.SIGINT)
    program.finish(started)
    assert program.await_file("told.0") == program.await_file("told.1") == "yes"


EPOCHS = 4


@pytest.mark.parametrize(("cpus", "lost"), [((1, 1), 1), ((0, 1, 1), None)], ids=["beside the supervisor", "elsewhere"])
def test_a_job_that_loses_a_node_goes_on_from_its_last_step_to_the_same_bits(program, nodes, cpus, lost):
    text = (Path(__file__).parents[1] / "chaos/restarted.py").read_text()
    program.script("from disttrain import env\nprint('kept at', env.last_step())\n" + text, "restarted.py")
    address, cluster = nodes(*cpus)
    job = program.start(
        *("run", "-n", "2", "--launcher", "ray", "--address", address, "--max-restarts", "1", "--min-workers", "1"),
        *("restarted.py", str(EPOCHS)),
    )
    while program.await_file("steps.1").count("\n") < 6:
        time.sleep(0.05)
    remove_last(cluster)
    done = program.finish(job)
    assert done.exit_code == 0, done.err
    found = re.search(r"disttrain: rank (\d) of 2 failed first, on host \S+, exit code 137:\n(.*)", done.err)
    assert found, done.err
    assert lost in (None, int(found[1]))
    words = f"was lost: Ray's node there, with rank(s) {found[1]} of this job, does not answer any more"
    assert words in found[2]
    why = rf"disttrain: restart 1 of 1, because rank {found[1]} of 2 failed with the loss of its node, in step \d+"
    goes_on = re.search(rf"{why}; it goes on from step (\d+), on 1 worker\n", done.err)
    steps = [line.split()[0] for line in program.await_file("steps.0").splitlines()]
    again = steps[steps.index("pid", 1) + 1 :]  # by rank 0 of the second attempt
    assert again == [str(step) for step in range(int(goes_on[1]) + 1, 8 * EPOCHS + 1)]
    assert ("kept at disttrain.ray.keeper//" in done.out) == (lost is None)
    alone = program.run("run", "restarted.py", str(EPOCHS))
    assert re.search("finished .*", done.out)[0] == re.search("finished .*", alone.out)[0]
