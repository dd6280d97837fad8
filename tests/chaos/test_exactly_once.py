"""A run that is killed again and again, and goes on with other numbers of workers, reads each sample once an epoch."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest

from disttrain import checkpoint
from disttrain.checkpoint.inspection import entries

pytestmark = pytest.mark.timeout(600)

STEPS_PER_EPOCH = 11  # of 103 samples in batches of 10: the last has 3
MOST_STEPS = 9  # between two kills: up to 4, and those of 5 ms that fit into 0.02 s
SEED = 5


def run(program, workers, epochs, *kill):
    how = ("--launcher", "local") if workers > 1 else ()
    return program.run("run", "-n", str(workers), *how, "killed.py", str(epochs), *map(str, kill))


def finished(done):
    assert done.exit_code == 0, done.err
    (found,) = set(re.findall(r"finished (\w{64} \S+)", done.out))
    return found


def audit(program, *environment):
    done = program.run("ckpt", "audit", "saved", "--json", "audit.json")
    return done, json.loads((program.folder / "audit.json").read_text()) if done.exit_code != 2 else None


@pytest.mark.parametrize(("kills", "resizes"), [(3, 2), pytest.param(20, 5, marks=pytest.mark.long)])
def test_each_sample_is_read_once_an_epoch_through_kills_and_resizes(program, kills, resizes):
    program.limit_s = 300.0
    shutil.copy(Path(__file__).with_name("killed.py"), program.folder)
    chance = random.Random(SEED)
    sizes = [2]
    for _ in range(resizes):
        sizes.append(chance.choice([size for size in (1, 2, 3, 4) if size != sizes[-1]]))
    epochs = 1 + kills * MOST_STEPS // STEPS_PER_EPOCH
    undisturbed = finished(run(program, 1, epochs))
    shutil.rmtree(program.folder / "saved")
    for number in range(kills):
        workers = sizes[number * (resizes + 1) // kills]
        # two steps at least: then the first is on the disk
        done = run(program, workers, epochs, chance.randrange(workers), chance.randint(2, 4), chance.uniform(0, 0.02))
        assert done.exit_code != 0, (number, done.out)
    assert finished(run(program, sizes[-1], epochs)) == undisturbed
    done, rows = audit(program)
    assert done.exit_code == 0, done
    last = rows[-1]
    assert last["in_order"]
    assert (last["epochs"], last["begun"]) == ([0, epochs], 0)
    assert f"each of 103 samples exactly once in epoch{'s 0 to ' if epochs > 1 else ' '}{epochs - 1}" in done.out
    assert last["world_sizes"] == [*(sizes[n * (resizes + 1) // kills] for n in range(kills)), sizes[-1]]


def test_a_ledger_that_was_changed_is_refused(program):
    shutil.copy(Path(__file__).with_name("killed.py"), program.folder)
    program.env["DISTTRAIN_LEDGER_KEY_FILE"] = str(program.folder / "key")
    (program.folder / "key").write_text("a secret\n")
    finished(run(program, 2, 1))
    done, rows = audit(program)
    assert done.exit_code == 0, done
    assert [row["world_sizes"] for row in rows] == [[2], [2]]
    saved = checkpoint.load(program.folder / "saved")

    def tampered(change):
        values = json.loads(json.dumps(saved.values))
        change(values["training"])
        checkpoint.save(program.folder / "saved", saved.tensors, values)
        assert len(entries(program.folder / "saved", thoroughly=True)[-1].damage) == 0  # to its hashes it is whole
        done, rows = audit(program)
        assert done.exit_code == 1, done
        assert not rows[-1]["in_order"]
        return rows[-1]["words"]

    def halve(training):
        part = training["ledger"][0]
        training["ledger"] = [{**part, "end": [0, 5]}, {**part, "begin": [0, 5]}]

    assert "the chain of part 0" in tampered(halve)
    assert "the chain of part 0" in tampered(lambda training: training["ledger"][0].update(world_size=1))
    assert "the run goes on with step 3 of epoch 0" in tampered(lambda training: training.update(epoch=0, step=3))
    assert "the chain of part 0" in tampered(lambda training: training.update(seed=1))
    assert "lacks what an audit needs" in tampered(lambda training: training.pop("ledger"))
    # whoever has not the key can make a ledger, but not this one
    program.env.pop("DISTTRAIN_LEDGER_KEY_FILE")
    shutil.rmtree(program.folder / "saved")
    finished(run(program, 2, 1))
    assert audit(program)[0].exit_code == 0
    program.env["DISTTRAIN_LEDGER_KEY_FILE"] = str(program.folder / "key")
    done, rows = audit(program)
    assert done.exit_code == 1
    assert "has another key" in rows[-1]["words"]


def test_what_has_no_ledger_is_not_audited(program):
    checkpoint.save(program.folder / "saved", {}, {"model": None})
    done, _ = audit(program)
    assert done.exit_code == 2
    assert "no checkpoint here is of a training" in done.err
