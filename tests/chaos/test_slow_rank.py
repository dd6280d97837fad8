"""A rank that is slow, in data, in its steps or to send, is named once, and for what; the job goes on to its end."""

import re
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.launch.conftest import Program

pytestmark = pytest.mark.timeout(120)

FROM_STEP, SOON = 10, 20  # steps
KINDS = {"data": "data", "compute": "compute", "network": "network", "stopped": "compute", "none": ""}
STEPS = {"stopped": 150, "none": 200}  # else 30; what becomes slow by little is seen later
TRANSPORTS = ["MPI", "shm", "tcp"]
TRIALS, AT_ONCE = 30, 3
NAMED = re.compile(r"rank (\d) of \d is slow, .* at step (\d+): .* of the difference in (\w+)")


def run(program, kind, transport, *, rank=1, ranks=2):
    shutil.copy(Path(__file__).with_name("slow.py"), program.folder)
    program.env["OPENBLAS_NUM_THREADS"] = "1"
    if kind == "network":
        program.env["DISTTRAIN_KERNELS"] = "numpy"  # so that sums go by messages
    options = [] if transport == "MPI" else ["--launcher", "local", "--transport", transport]
    done = program.run("run", "-n", str(ranks), *options, "slow.py", kind, str(rank), str(STEPS.get(kind, 30)))
    assert done.exit_code == 0, done.err
    assert done.out.count("trained") == ranks
    return [(int(who), int(step), what) for who, step, what in NAMED.findall(done.err)]


@pytest.mark.parametrize(
    ("kind", "transport"),
    [("data", "tcp"), ("compute", "MPI"), ("compute", "shm"), ("network", "tcp"), ("none", "shm")],
)
def test_a_slow_rank_is_named_once_and_the_job_goes_on(request, program, kind, transport):
    if transport == "MPI":
        request.getfixturevalue("mpi")
    named = run(program, kind, transport)
    assert [(rank, what) for rank, _, what in named] == ([] if kind == "none" else [(1, KINDS[kind])])
    assert all(FROM_STEP < step <= FROM_STEP + SOON for _, step, _ in named)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_of_a_hundred_and_twenty_slow_ranks_nearly_all_are_named_and_hardly_any_other(mpi, tmp_path, capsys):
    def trial(kind, number):
        folder = tmp_path / f"{kind}.{number}"
        folder.mkdir()
        ranks = 2 + number % 3
        rank = number // 3 % ranks
        named = run(Program(folder), kind, TRANSPORTS[number % 3], rank=rank, ranks=ranks)
        return kind, [(who == rank and what == KINDS[kind], step - FROM_STEP) for who, step, what in named]

    with ThreadPoolExecutor(AT_ONCE) as pool:
        done = list(pool.map(lambda each: trial(*each), [(kind, n) for n in range(TRIALS) for kind in KINDS]))
    right, wrong, late = Counter[str](), Counter[str](), dict.fromkeys(KINDS, 0)
    for kind, named in done:
        right[kind] += any(is_right for is_right, _ in named)
        wrong[kind] += sum(not is_right for is_right, _ in named)
        late[kind] = max([late[kind], *(step for is_right, step in named if is_right)])
    precision = right.total() / (right.total() + wrong.total())
    recall = right.total() / (TRIALS * (len(KINDS) - 1))
    with capsys.disabled():
        print("\n| slow in | named | named wrongly | at the latest after steps |\n|---|---|---|---|")
        for kind in KINDS:
            print(f"| {kind} | {right[kind]} of {TRIALS if kind != 'none' else 0} | {wrong[kind]} | {late[kind]} |")
        print(f"precision {precision:.3f}, recall {recall:.3f}")
    assert precision >= 0.95
    assert recall >= 0.95
