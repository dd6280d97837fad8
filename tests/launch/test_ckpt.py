"""`disttrain ckpt` names what is damaged, says which checkpoint would be used, and never touches a good one."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from disttrain import checkpoint
from launch.cli import main
from tests.checkpoint import shelf


@pytest.fixture
def run(tmp_path):
    """Return a directory with checkpoints 1 to 3."""
    for number in (1, 2, 3):
        shelf.save(tmp_path / "run", number, keep=5)
    return tmp_path / "run"


def ckpt(*arguments, code=0):
    """Return what a command prints, after comparing its exit code."""
    done = CliRunner().invoke(main, ["ckpt", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.output
    assert done.exit_code == code, done.output
    return done.output


def damage(run, number, name="model.safetensors"):
    path = run / f"checkpoint-00000{number}" / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def test_a_list_says_what_there_is(run, tmp_path):
    metric = checkpoint.Metric(name="val_loss", value=0.25, mode="min")
    place = checkpoint.storage(run)
    tensors = checkpoint.writing.whole({"model": {"x": np.zeros(250_000)}})
    values = {"training": {"epoch": 3, "iterations": 70}}
    checkpoint.writing.write(place, tensors, values, keep=checkpoint.Keep(last=9), metric=metric)
    (run / "checkpoint-000002" / "manifest.json").write_text("{}")
    printed = ckpt("ls", run, "--json", tmp_path / "list.json").splitlines()
    assert [line.split()[0] for line in printed[1:5]] == [f"checkpoint-00000{n}" for n in (1, 2, 3, 4)]
    assert printed[4].split()[4:] == ["2.0", "3", "70", "val_loss", "0.25"]
    rows = json.loads((tmp_path / "list.json").read_text())
    assert [row["state"] for row in rows] == ["", "damaged", "", ""]
    assert "manifest.json: not a manifest" in rows[1]["trouble"]
    assert printed[5:] == [f"checkpoint-000002: {rows[1]['trouble']}"]


def test_a_checkpoint_is_shown_with_its_tensors(run, tmp_path):
    printed = ckpt("show", run, "--json", tmp_path / "show.json")
    assert "dense/kernel" in printed
    assert "[2, 3]" in printed
    assert 'name: "Zo\\u00eb"' in printed
    found = json.loads((tmp_path / "show.json").read_text())
    assert found["values"] == {**shelf.VALUES, "number": 3}
    assert {f["file"] for f in found["files"]} == {"model.safetensors", "optimizer.safetensors"}
    assert "number: 1" in ckpt("show", run / "checkpoint-000001")


def test_what_a_file_says_is_no_command_for_the_terminal(tmp_path):
    checkpoint.save(tmp_path / "run", {"model": {"\x1b[2Jx": np.zeros(1)}}, {"note": "\x1b[2J"})
    assert "\x1b" not in ckpt("show", tmp_path / "run")


def test_what_is_damaged_is_named_and_so_is_what_would_be_used(run, tmp_path):
    assert ckpt("verify", run).splitlines()[-1] == "would be used: checkpoint-000003"
    damage(run, 3)
    damage(run, 3, "optimizer.safetensors")
    damage(run, 1, "manifest.json")
    *lines, used = ckpt("verify", run, "--json", tmp_path / "found.json", code=1).splitlines()
    assert used == "would be used: checkpoint-000002"
    assert lines[1] == "checkpoint-000002: whole"
    assert "manifest.json" in lines[0]
    assert "model.safetensors: its SHA-256 is" in lines[2]
    assert "optimizer.safetensors: its SHA-256 is" in lines[2]
    assert shelf.number_in(run) == 2  # what it says is so
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["used"] == "checkpoint-000002"
    assert [set(each["damage"]) for each in found["checkpoints"]] == [
        {"manifest.json"}, set(), {"model.safetensors", "optimizer.safetensors"}
    ]  # fmt: skip
    damage(run, 2)
    assert ckpt("verify", run, code=1).splitlines()[-1] == "none can be used"


def test_a_single_checkpoint_is_verified_by_its_own_path(run):
    assert f"{run}/checkpoint-000002: whole" in ckpt("verify", run / "checkpoint-000002")


def test_one_of_a_newer_version_is_not_called_damaged(run):
    shelf.forge(run / "checkpoint-000003", lambda body: body.update(version=2))
    assert "this version of disttrain reads" in ckpt("verify", run, code=1)
    assert ckpt("repair", run) == "nothing to repair\n"
    assert (run / "checkpoint-000003").exists()


def test_a_comparison_says_which_tensors_differ_and_by_how_much(run, tmp_path):
    kernel = np.array([[0, 1, 2], [3, 4, np.nan]], np.float32)
    others = {
        "model": {"dense/kernel": kernel, "dense/bias": -shelf.TENSORS["model"]["dense/bias"], "extra": np.zeros(2)},
        "optimizer": {"dense/kernel/velocity": np.full(6, 1e-7)},
    }
    one, two = run / "checkpoint-000001", tmp_path / "other"
    checkpoint.save(two, others, None)
    printed = ckpt("diff", one, two, "--json", tmp_path / "diff.json", code=1)
    assert printed.splitlines()[-1] == "5 of 5 tensors differ"
    found = {each.pop("tensor"): each for each in json.loads((tmp_path / "diff.json").read_text())["differences"]}
    assert found["model:dense/kernel"] == {"elements": 1, "of": 6, "largest": None, "relative": None}
    assert found["model:dense/bias"] == {"elements": 3, "of": 3, "largest": 0.0, "relative": None}  # -0.0
    assert found["model:extra"] == {"only": 2}
    assert found["model:number"] == {"only": 1}
    assert found["optimizer:dense/kernel/velocity"] == {"kinds": ["float64 [2, 3]", "float64 [6]"]}
    assert ckpt("diff", run, run) == "all 4 tensors have the same bits\n"
    assert ckpt("diff", run, run / "checkpoint-000001", code=1).splitlines()[-1] == "1 of 4 tensors differ"
    ckpt("diff", run, tmp_path / "nowhere", code=2)


def test_a_distance_is_that_of_numpy(tmp_path):
    a, b = np.random.default_rng(0).normal(size=(2, 50)).astype(np.float32)
    checkpoint.save(tmp_path / "a", {"model": {"x": a}}, None)
    checkpoint.save(tmp_path / "b", {"model": {"x": b}}, None)
    ckpt("diff", tmp_path / "a", tmp_path / "b", "--json", tmp_path / "diff.json", code=1)
    (found,) = json.loads((tmp_path / "diff.json").read_text())["differences"]
    a, b = a.astype(np.float64), b.astype(np.float64)
    assert found["largest"] == np.abs(a - b).max()
    assert found["relative"] == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-14)


def test_repair_removes_what_is_half_written_and_sets_aside_what_is_damaged(run):
    damage(run, 2)
    (run / ".tmp-0123").mkdir()
    (run / ".tmp-0123" / "model.safetensors").write_text("half")
    (run / "notes.txt").write_text("mine")
    printed = ckpt("repair", run)
    assert ".tmp-0123: half-written or half-removed, removed" in printed
    assert "checkpoint-000002: damaged, set aside as damaged-checkpoint-000002" in printed
    left = shelf.names(run)
    assert left == ["checkpoint-000001", "checkpoint-000003", "damaged-checkpoint-000002", "notes.txt"]
    assert shelf.number_in(run / "checkpoint-000001") == 1
    assert ckpt("verify", run).splitlines()[-1] == "would be used: checkpoint-000003"
    assert ckpt("repair", run) == "nothing to repair\n"


def test_an_aside_of_the_same_name_stays(run):
    for _ in range(2):
        damage(run, 3)
        ckpt("repair", run)
        (run / "checkpoint-000002").rename(run / "checkpoint-000003")
        shelf.save(run, 9, keep=5)
        (run / "checkpoint-000004").rename(run / "checkpoint-000002")
    assert {"damaged-checkpoint-000003", "damaged-checkpoint-000003.2"} <= set(shelf.names(run))


@pytest.mark.parametrize(("name", "read"), [("w.safetensors", load_file), ("w.npz", np.load)])
def test_weights_are_exported(run, tmp_path, name, read):
    damage(run, 3)
    assert "checkpoint-000002" in ckpt("export", run, tmp_path / name)
    found = dict(read(tmp_path / name))
    assert found.pop("number") == 2
    assert found.keys() == shelf.TENSORS["model"].keys()
    for weight, array in shelf.TENSORS["model"].items():
        np.testing.assert_array_equal(found[weight], array, strict=True)


@pytest.mark.parametrize("command", ["ls", "show", "verify", "repair"])
def test_where_there_is_none_the_command_fails(tmp_path, command):
    assert "there is no checkpoint here" in ckpt(command, tmp_path, code=2)


def test_an_export_that_cannot_be_is_refused(run, tmp_path):
    assert "expected a name that ends with" in ckpt("export", run, tmp_path / "w.pt", code=2)
    assert "No such file" in ckpt("export", run, tmp_path / "missing" / "w.npz", code=2)
    checkpoint.save(tmp_path / "other", {"things": {}}, None)
    assert "holds no weights: its groups are things" in ckpt("export", tmp_path / "other", tmp_path / "w.npz", code=2)
