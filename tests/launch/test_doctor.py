"""`disttrain doctor` says what is here; a problem is a finding, not a failure."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from disttrain.kernels import build, library
from disttrain.kernels.instruction_sets import cpu_flags, runnable
from launch.cli import main


@pytest.fixture(autouse=True)
def _fresh_choice():
    library.chosen.cache_clear()
    yield
    library.chosen.cache_clear()


def diagnose(*options):
    done = CliRunner().invoke(main, ["doctor", *options])
    assert done.exit_code == 0, done.output
    return done.output


def test_what_it_prints_is_what_it_writes(tmp_path):
    file = tmp_path / "doctor.json"
    printed = diagnose("--json", str(file))
    found = json.loads(file.read_text())
    assert found["versions"]["NumPy"] == np.__version__
    assert found["kernels"]["used"] == library.chosen().name
    assert found["CPU"]["cores"] >= 1
    assert found["mpi4py"].keys() & {"loads", "problem"}
    assert found["MPI"].keys() & {"mpiexec", "problem"}
    for facts in found.values():
        for value in facts.values():
            assert (" ".join(value) if isinstance(value, list) else str(value)) in printed


def test_it_says_why_numpy_computes(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = [path.name for path in build.INSTALLED.glob("*.so")]
    others = [each.name for each in runnable(cpu_flags()) if not any(name.startswith(each.name) for name in built)]
    if not others:
        pytest.skip("kernels for all that this CPU runs were built at installation")
    monkeypatch.setenv("DISTTRAIN_KERNELS", others[0])
    printed = diagnose()
    assert "used numpy" in printed
    assert "because /bin/false ended with exit code 1" in printed


def test_a_wrong_setting_is_a_finding(monkeypatch):
    monkeypatch.setenv("DISTTRAIN_KERNELS", "sse9")
    assert "DISTTRAIN_KERNELS=sse9" in diagnose()
