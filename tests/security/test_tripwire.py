"""Files and messages that were made to run code run none: whoever reads them imports, evaluates, writes nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(60)
def test_nothing_that_is_read_runs_code(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.security.tripwire", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=tmp_path.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout)
    # what the test has unpickled at the end, so that something is heard
    assert [event for _, event, _ in said["heard"]] == ["pickle.find_class", "os.mkdir"], said["heard"]
    assert sum(said["counts"].values()) >= 250
    assert len(said["counts"]) == 12
