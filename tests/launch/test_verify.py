"""`disttrain verify`: whether numbers of workers agree, and where they part."""

import json

import pytest

from launch.verify import difference

pytestmark = pytest.mark.timeout(120)

# What is wrong with it is its first argument.
SCRIPT = """
import sys
import numpy as np
import disttrain as dt

mode, *rest = sys.argv[1:]
layers = dt.layers
generator = np.random.default_rng(0)
x, y = generator.normal(size=(40, 6, 6, 1)), generator.integers(0, 3, 40)
comm = dt.init()


class Odd(dt.Layer):
    def call(self, x):
        if mode == "random":
            return x + np.random.default_rng().normal()
        return x * (1 + comm.rank) if mode == "rank" else x


model = dt.Sequential([
    layers.Conv2D(4, 3, activation="relu", input_shape=(6, 6, 1)),
    layers.BatchNormalization(synchronized=mode != "unsynchronized"),
    Odd(name="odd"),
    layers.Flatten(),
    layers.Dropout(0.2),
    layers.Dense(3, activation="softmax"),
])
if mode == "initial":
    model.weights[0].data += comm.world_size
if mode == "samples":
    x = x * comm.world_size
if mode == "none":
    sys.exit()
if mode == "failing":
    raise ValueError("no luck")
model.compile("adam", "sparse_categorical_crossentropy")
backup = dt.callbacks.BackupAndRestore("backup", save_freq=1)
model.fit(x, y, 13, 3, verbose=0, callbacks=[backup], reproducible=mode not in ("plain", "unsynchronized"))
model.save("saved")
print("the end", *rest)
"""


def verify(program, mode, *options):
    script = program.script(SCRIPT)
    return program.run("verify", "-n", "1,3", "--launcher", "local", *options, script, mode)


def test_a_reproducible_script_agrees(program):
    finished = verify(program, "right", "--steps", "5", "--json", "found.json")
    assert finished.exit_code == 0, finished
    first, second, last = finished.out.splitlines()[-3:]
    assert last == "2 numbers of workers agree"
    assert first.startswith("1 worker (local, 8 shards")
    assert second.startswith("3 workers (shm, 8 shards")
    assert first.partition("): ")[2] == second.partition("): ")[2]
    assert first.endswith("after 5 steps")
    found = json.loads((program.folder / "found.json").read_text())
    assert found["agree"]
    kinds = {(step, kind) for step, kind, *_ in found["runs"][0]["notes"]}
    # three epochs of four steps, each first eager; two eager ones of a shape, then a plan, whose layers nobody calls
    assert {(step, "gradient") for step in range(5)} <= kinds
    assert {(0, "output"), (1, "output")} <= kinds
    # ended before the end; nothing was saved, nor found by the second run
    assert "the end" not in finished.out
    assert not (program.folder / "backup").exists()
    assert not (program.folder / "saved").exists()


@pytest.mark.parametrize(
    ("mode", "where", "why"),
    [
        ("plain", "the gradient of 'dense/bias', step 0", "use fit(reproducible=True)"),
        ("unsynchronized", "the output of layer 'batch_normalization', step 0", "synchronized=False normalizes"),
        ("rank", "the output of layer 'odd', step 0", "what 'odd' computes depends on the rank"),
        ("initial", "the initial value of 'conv2d/kernel', step 0", "must depend on the seed alone"),
        ("samples", "the samples 'x' of the batch, step 0", "the same arrays"),
    ],
)
def test_the_first_difference_is_named_with_its_reason(program, mode, where, why):
    finished = verify(program, mode)
    assert finished.exit_code == 1, finished
    (line,) = [line for line in finished.out.splitlines() if line.startswith("1 worker and 3 workers: ")]
    assert f"first in {where}" in line
    assert why in line
    assert "two runs on 1 worker" not in finished.out
    assert finished.out.endswith("they do not agree\n")


def test_randomness_without_a_seed_is_told_from_the_number_of_workers(program):
    finished = verify(program, "random")
    assert finished.exit_code == 1, finished
    assert "two runs on 1 worker differ as well, first in the output of layer 'odd', step 0" in finished.out


@pytest.mark.parametrize(("mode", "text"), [("none", "took no step"), ("failing", "failed with exit code 1")])
def test_what_cannot_be_compared_does_not_agree(program, mode, text):
    finished = verify(program, mode)
    assert finished.exit_code == 2
    assert f"on 1 worker {text}" in finished.err


@pytest.mark.parametrize("workers", ["2", "1,1", "1,x", "0,1", ""])
def test_fewer_than_two_numbers_are_refused(program, workers):
    finished = program.run("verify", "-n", workers, program.script(SCRIPT), "right")
    assert finished.exit_code == 2
    assert "expected several numbers of workers" in finished.err


def notes(*digests, steps=1):
    return {"steps": steps, "notes": [[0, "gradient", name, digest, 1.0] for name, digest in digests]}


def test_differences_are_found_in_the_order_of_causes():
    one = notes(("a", "1"), ("b", "2"), ("c", "3"))
    assert difference(one, one) is None
    assert difference(one, notes(("c", "x"), ("b", "y"), ("a", "1")))[2] == "b"
    assert difference(one, notes(("a", "1"), ("b", "2"), ("c", "3"), steps=2))[1] == "steps"
