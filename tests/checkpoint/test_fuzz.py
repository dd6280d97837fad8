"""Checkpoints altered at random, with hashes that are right: only disttrain's errors, no memory, no other file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(1900)
@pytest.mark.parametrize(
    "examples", [pytest.param(300, id="short"), pytest.param(10_000, id="long", marks=pytest.mark.long)]
)
def test_an_altered_checkpoint_does_no_harm(tmp_path, examples):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("hostile.py")), str(examples), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=tmp_path.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout)
    assert counts["refused"] > 0.5 * examples
    assert counts["refused"] + counts["loaded"] >= examples
    print(counts)
