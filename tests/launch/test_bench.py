"""`disttrain bench`, with systems that need no framework."""

import json
import signal
import time

import psutil
import pytest
from click.testing import CliRunner

from benchmarks import program, systems, tasks
from benchmarks.measure import Sample
from disttrain.data import package
from launch import bench as module
from launch.bench import bench

TOYS = "tests.benchmarks.toys"


def run(*arguments):
    return CliRunner().invoke(bench, arguments)


def step(*arguments):
    return run("step", *arguments)


def test_the_figures_are_shown_and_kept(tmp_path):
    path = tmp_path / "figures.json"
    named = f"disttrain,{TOYS}.missing"
    result = step("W1", "--systems", named, "--seconds", "0.01", "--json", str(path))
    assert result.exit_code == 0, result.output
    assert "MLP 784-128-10, batch 128, Adam" in result.output
    assert f"gap: W1 {TOYS}.missing: a_framework_that_is_not_there is not installed\n" in result.output
    kept = json.loads(path.read_text())
    assert {"cpu", "flags", "cores", "system", "python", "date", "load", "settings"} <= set(kept["machine"])
    row, gap = kept["rows"]
    assert row.keys() == gap.keys()
    assert (kept["task"], row["unit"]) == ("step", "ms")
    assert {"workload", "system", "precision", "median", "spread", "ratio_to_best_peer", "best_peer"} <= set(row)
    assert {"product_error", "versions", "variant", "values", "gap"} <= set(row)
    assert (row["workload"], row["system"], row["gap"]) == ("W1", "disttrain", None)
    assert row["median"] > 0
    assert set(row["versions"]) == {"disttrain", "numpy"}
    assert (gap["system"], gap["gap"]) == (f"{TOYS}.missing", "a_framework_that_is_not_there is not installed")


def test_a_system_that_fails_makes_the_exit_code_1_after_all_is_shown():
    result = step("W1", "--systems", f"{TOYS}.good,{TOYS}.forgetful", "--seconds", "0.01")
    assert result.exit_code == 1
    assert "best 1.00" in result.output
    assert f"gap: W1 {TOYS}.forgetful: ended with exit code 1\n" in result.output
    assert "RuntimeError: the loss does not fall: 3.0000, after 20 steps 3.0000\n" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step", "W9"], "unknown workload 'W9'"),
        (["step", "W1", "--systems", "disttrian"], "unknown system 'disttrian'; did you mean 'disttrain'?"),
        (["step", "W1", "--systems", "disttrain:hihg"], "unknown form 'hihg'; did you mean 'high'?"),
        (["step", "W1", "--systems", "torch:high"], "'torch:high': only disttrain has forms"),
        (["memory", "W1", "--json", "no/such/folder/x.json"], "there is no folder no/such/folder"),
        (["epoch", "W4"], "epoch is measured on W1, W2, W3, not on W4"),
        (["scaling", "W1", "--workers", "4096"], "4096 workers need a core each; this process may use"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_measured(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert "W1: " not in result.output


def test_all_systems_are_those_of_the_task_and_each_form_of_disttrain(monkeypatch):
    asked = []
    monkeypatch.setattr(
        program, "measure", lambda task, workload, names, **_: [Sample(workload="W1", system=n) for n in names]
    )
    monkeypatch.setattr(program.figures, "rows", lambda task, samples: asked.extend(s.system for s in samples) or [])
    assert run("memory", "W1", "--systems", "all,jax").exit_code == 0
    assert asked == ["disttrain", "torch", *systems.forms(), "jax"]


def test_an_epoch_without_its_data_says_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setenv("DISTTRAIN_DATA", str(tmp_path))
    monkeypatch.setattr(package, "_SYSTEM_ROOTS", {"apt": tmp_path})
    result = run("epoch", "W1")
    assert result.exit_code == 1
    assert "disttrain data fashion_mnist" in result.output


def test_there_is_a_command_for_each_task():
    assert sorted(bench.commands) == sorted([*tasks.names(), "allreduce"])  # which has no workload


def test_without_the_folder_it_says_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_ROOT", tmp_path)
    result = step("W1")
    assert result.exit_code == 1
    assert f"there is no folder {tmp_path / 'benchmarks'}" in result.output
    assert "make env-bench" in result.output


@pytest.mark.parametrize("name", tasks.names())
def test_the_help_of_each_task_shows_examples(name):
    lines = [line.strip() for line in run(name, "--help").output.splitlines()]
    assert any(line.startswith(f"disttrain bench {name}") for line in lines[lines.index("Examples:") :])


def test_the_help_shows_each_example_on_a_line():
    lines = step("--help").output.splitlines()
    assert any(line.strip().startswith("disttrain bench step W1 W2 --systems disttrain,torch ") for line in lines)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_program(program, number):
    process = program.start("bench", "step", "W1", "--systems", f"{TOYS}.hanging")
    end_s = time.monotonic() + 60
    while not psutil.Process(process.pid).children():
        assert time.monotonic() < end_s
        time.sleep(0.01)
    process.send_signal(number)
    program.finish(process)
    while program.left() and time.monotonic() < end_s:
        time.sleep(0.01)  # the system ends them, in its own time
