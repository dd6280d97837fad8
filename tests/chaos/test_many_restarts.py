"""A supervisor that starts a job again and again keeps no file, thread or memory of what has been."""

import pytest

DIES = """
import os, signal, psutil
from disttrain import env, progress
import disttrain as dt
comm = dt.init()
supervisor = psutil.Process(int(env.last_step().partition(":")[0]))
used = f"{supervisor.num_fds()} {supervisor.num_threads()} {supervisor.memory_info().rss >> 10}"
attempt = len(open("used").readlines()) if os.path.exists("used") else 0
comm.barrier()
if comm.rank == 0:
    with open("used", "a") as file:
        file.write(used + chr(10))
progress.begin_step(attempt)  # another one each time, or it would be given up
comm.barrier()
if attempt < RESTARTS and comm.rank == attempt % 2:
    os.kill(os.getpid(), signal.SIGKILL)
comm.barrier()
"""
KB_A_RESTART = 4  # of growth: the cause of each is told at the end, 100 bytes; and what malloc does with them


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("restarts", [8, pytest.param(500, marks=pytest.mark.long)])
def test_nothing_is_kept(program, figures, restarts):
    program.limit_s = 1400.0
    script = program.script(DIES.replace("RESTARTS", str(restarts)))
    done = program.run("run", "-n", "2", "--launcher", "local", "--max-restarts", str(restarts), script)
    assert done.exit_code == 0, done.err[-5000:]
    assert done.err.count("disttrain: restart 1 of") == 1
    rows = [[int(word) for word in line.split()] for line in (program.folder / "used").read_text().splitlines()]
    assert len(rows) == restarts + 1
    first, warm, last = rows[0], rows[min(5, restarts)], rows[-1]
    assert last[:2] == first[:2], (first, last)
    assert last[2] - warm[2] <= max(512, KB_A_RESTART * restarts), (warm, last)
    figures.append(f"{restarts} restarts: {last[0]} files, {last[1]} threads; from {warm[2]} to {last[2]} kB")
