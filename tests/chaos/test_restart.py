"""A job whose workers are killed goes on by itself, from its last step, on any number of workers, to the same bits."""

import dataclasses
import itertools
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.chaos.jobs import await_end_of, workers_of

pytestmark = [pytest.mark.usefixtures("mpi"), pytest.mark.timeout(240)]

EPOCHS, STEPS = 3, 24  # of 60 samples, 8 to a batch
INTERVAL = 7  # between two files
TRIALS = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """What is done to a job; chosen by its number alone, so that it can be repeated."""

    sizes: list[int]  # workers that there is room for, one more than there are kills
    launcher: str
    transport: str
    targets: list[str]
    waits: list[bool]  # whether a kill comes after a step of the attempt, or may come while it starts
    delays_s: list[float]
    has_files: bool


def trial(number):
    chance = random.Random(number)
    launcher, transport = chance.choice([("local", "shm"), ("local", "tcp"), ("mpirun", "")])
    kills = chance.choice([1, 1, 2])
    targets = [chance.choice(["rank", "rank", "all"]) for _ in range(kills)]
    has_files = chance.random() < 0.5
    if has_files and chance.random() < 0.3:
        targets[-1] = "supervisor"
    return Trial(
        sizes=[chance.randint(1, 4) for _ in range(kills + 1)],
        launcher=launcher,
        transport=transport,
        targets=targets,
        waits=[chance.random() < 0.7 for _ in range(kills)],
        delays_s=[chance.uniform(0, 1.5) for _ in range(kills)],
        has_files=has_files,
    )


@pytest.fixture
def job(program):
    """Return a program in whose folder are the training, and a launcher that has not always room."""
    program.limit_s = 120.0
    (program.folder / "kinds").mkdir()
    for name, to in (("restarted.py", "."), ("scarce.py", "kinds")):
        shutil.copy(Path(__file__).with_name(name), program.folder / to)
    return program


def start(job, each, room, epochs=EPOCHS):
    (job.folder / "room").write_text(f"{room} {each.launcher}")
    transport = ["--transport", each.transport] if each.transport else []
    bounds = ["--max-restarts", "9", "--min-workers", "1", "--max-workers", "4"]
    files = ["files"] if each.has_files else []
    return job.start(
        "run", "-n", "4", "--launcher", "kinds.scarce", *transport, *bounds, "restarted.py", str(epochs), *files
    )


def notes_of(job, rank):
    path = job.folder / f"steps.{rank}"
    return path.read_text().splitlines() if path.exists() else []


def kill(job, process, target, chance):
    """Kill as `target` says, and return when; None if there was nobody left."""
    pids = workers_of(process) if process.poll() is None else []
    if not pids:
        return None
    victims = {"all": pids, "rank": [chance.choice(pids)], "supervisor": [process.pid]}[target]
    for pid in victims:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return time.monotonic()


def attempts_of(lines):
    """Return, for each attempt that a rank took part in, its steps with their times."""
    found = []
    for line in lines:
        if line.startswith("pid"):
            found.append([])
        else:
            step, time_s = line.split()
            found[-1].append((int(step), float(time_s)))
    return [each for each in found if each]


def end_of(done):
    assert done.exit_code == 0, done.err
    (found,) = re.findall(r"finished .*", done.out)
    return found


def run_alone(job, epochs=EPOCHS):
    done = job.run("run", "restarted.py", str(epochs))
    (job.folder / "steps.0").unlink()
    return end_of(done)


def check(job, each, killed_s, pauses_s, words):
    """Compare, for each restart, the last step before it and the first after it, as rank 0 has them."""
    attempts = attempts_of(notes_of(job, 0))
    assert attempts[-1][-1][0] == STEPS
    for before, after in itertools.pairwise(attempts):
        lost = before[-1][0] + 1 - after[0][0]
        limit = INTERVAL + 1 if "supervisor" in each.targets else 1
        assert 0 <= lost <= limit, f"{lost} steps were lost: {each}\n{words}"
        pauses_s.append(after[0][1] - max(at_s for at_s in killed_s if at_s < after[0][1]))
    restarts = re.findall(r"disttrain: restart \d+ of 9, because .* goes on from .*, on \d worker", words)
    assert "supervisor" in each.targets or len(restarts) >= len(attempts) - 1, words
    return len(attempts)


@pytest.mark.parametrize(
    ("launcher", "transport", "target", "sizes"),
    [("local", "shm", "rank", [3, 2]), ("local", "tcp", "all", [2, 3]), ("mpirun", "", "rank", [2, 1])],
)
def test_a_job_goes_on_from_the_step_at_which_it_was_killed(
    job, undisturbed, pauses_s, launcher, transport, target, sizes
):
    if not undisturbed:
        undisturbed["end"] = run_alone(job)
    each = Trial(
        sizes=sizes,
        launcher=launcher,
        transport=transport,
        targets=[target],
        waits=[True],
        delays_s=[0],
        has_files=target == "all",
    )
    process = start(job, each, sizes[0])
    await_steps(job, process, 5)
    (job.folder / "room").write_text(f"{sizes[1]} {launcher}")
    at_s = kill(job, process, target, random.Random(0))
    done = job.finish(process)
    assert end_of(done) == undisturbed["end"], done.err
    assert check(job, each, [at_s], pauses_s, done.err) == 2


@pytest.mark.parametrize("asks", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize(("launcher", "transport"), [("local", "shm"), ("mpirun", "")])
def test_a_job_with_few_workers_goes_on_with_more_when_there_is_room(job, undisturbed, launcher, transport, asks):
    epochs = EPOCHS if asks else 6 * EPOCHS  # else `disttrain run` asks its launcher after 10 s
    end = undisturbed.setdefault("end" if asks else "long end", None) or run_alone(job, epochs)
    undisturbed["end" if asks else "long end"] = end
    each = dataclasses.replace(trial(0), launcher=launcher, transport=transport, has_files=True)
    process = start(job, each, 2, epochs)
    await_steps(job, process, 4)
    (job.folder / "room").write_text(f"4 {launcher}")
    if asks:
        process.send_signal(signal.SIGUSR2)
    done = job.finish(process)
    assert end_of(done) == end, done.err
    assert re.findall(r"disttrain: more .* on 4 workers", done.err), done.err
    assert "restart" not in done.err
    notes = notes_of(job, 0)
    assert [line.split()[-1] for line in notes if line.startswith("pid")] == ["2", "4"]
    steps = [int(line.split()[0]) for line in notes if not line.startswith("pid")]
    assert steps == list(range(1, epochs * STEPS // EPOCHS + 1))  # each once
    check_ledger(job, epochs, [2, 4])


def check_ledger(job, epochs, sizes):
    """Check that what was saved says of each sample that it was read once an epoch, by so many ranks."""
    audited = job.run("ckpt", "audit", "files", "--json", "audit.json")
    assert audited.exit_code == 0, audited
    last = json.loads((job.folder / "audit.json").read_text())[-1]
    assert (last["epochs"], last["begun"], last["world_sizes"]) == ([0, epochs], 0, sizes)


@pytest.mark.long
@pytest.mark.parametrize("number", range(TRIALS))
def test_same_bits_whenever_it_is_killed(job, undisturbed, pauses_s, number):
    if not undisturbed:
        undisturbed["end"] = run_alone(job)
    each, chance = trial(number), random.Random(~number)
    process, killed_s = start(job, each, each.sizes[0]), []
    kills = zip(each.targets, each.waits, each.delays_s, each.sizes[1:], strict=True)
    for target, waits, delay_s, room in kills:
        if waits:
            await_steps(job, process, len(notes_of(job, 0)) + 3)
        time.sleep(delay_s)
        (job.folder / "room").write_text(f"{room} {each.launcher}")
        if (at_s := kill(job, process, target, chance)) is None:
            break
        killed_s.append(at_s)
        if target == "supervisor":
            first = job.finish(process)
            assert first.exit_code == -signal.SIGKILL
            await_end_of(job)
            process = start(job, each, room)
    done = job.finish(process)
    assert end_of(done) == undisturbed["end"], f"{each}\n{done.err}"
    check(job, each, killed_s, pauses_s, done.err)


def await_steps(job, process, number):
    """Wait until rank 0 has noted so much, or the job is at its end."""
    end_s = time.monotonic() + 60
    while len(notes_of(job, 0)) < number and process.poll() is None:
        assert time.monotonic() < end_s
        time.sleep(0.01)
