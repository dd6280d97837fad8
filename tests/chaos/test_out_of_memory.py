"""A rank that takes more memory than its cgroup may use is named, with that limit: not as an unknown SIGKILL."""

import contextlib
import time
import uuid
from pathlib import Path

import pytest

LIMIT_MB = 400
TAKE = """
import time
import disttrain as dt
comm = dt.init()
comm.barrier()
taken = []
while comm.rank == 1:
    taken.append(bytearray(b"x" * (1 << 24)))
time.sleep(60)
"""


@pytest.fixture
def cgroup():
    """Return the folder of a new cgroup with that limit, of either version; skip where this user can make none."""
    name = f"disttrain-test-{uuid.uuid4().hex}"
    for root, file in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        folder = root / name
        try:
            folder.mkdir()
        except OSError:
            continue
        with contextlib.ExitStack() as held:
            held.callback(remove, folder)
            if (folder / file).exists():
                (folder / file).write_text(str(LIMIT_MB << 20))
                yield folder
                return
    pytest.skip("not proven here: this user can make no cgroup with a limit of memory")


def remove(folder):
    end_s = time.monotonic() + 10
    while folder.exists():
        try:
            folder.rmdir()
        except OSError:  # its last process is still being ended
            assert time.monotonic() < end_s
            time.sleep(0.05)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_rank_that_takes_too_much_is_named_with_the_limit(program, cgroup, transport):
    enter = ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(cgroup)]
    command = ["run", "-n", "2", "--launcher", "local", "--transport", transport, program.script(TAKE)]
    done = program.finish(program.start(*command, before=enter))
    assert done.exit_code == 128 + 9
    assert "disttrain: rank 1 of 2, on host" in done.err
    assert "was ended by signal 9 (SIGKILL); the kernel has ended a process for lack of memory" in done.err
    assert f"the cgroup may use {LIMIT_MB} MiB" in done.err
