"""What was saved is what is loaded: values, dtypes, shapes; and the newest, of those that are kept."""

import json

import numpy as np
import pytest

from disttrain import checkpoint
from disttrain.errors import CheckpointError, ConfigError
from tests.checkpoint import shelf

DTYPES = ["float16", "float32", "float64", "int8", "uint8", "int16", "int32", "int64", "uint64", "bool", "complex64"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (5,), (2, 3, 4)])
def test_arrays_come_back_with_their_bits_dtype_and_shape(tmp_path, dtype, shape):
    array = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 100, shape).astype(dtype)
    checkpoint.save(tmp_path, {"group_1": {"a/b": array}}, None)
    np.testing.assert_array_equal(checkpoint.load(tmp_path).tensors["group_1"]["a/b"], array, strict=True)


@pytest.mark.parametrize(
    "array",
    [np.arange(12.0).reshape(3, 4).T, np.arange(12.0)[::-2], np.broadcast_to(np.float32(2), (2, 3)),
     np.asfortranarray(np.eye(3)), np.array([np.nan, np.inf, -0.0, 5e-324])],
)  # fmt: skip
def test_so_do_views_and_special_values(tmp_path, array):
    checkpoint.save(tmp_path, {"a": {"x": array}}, None)
    loaded = checkpoint.load(tmp_path).tensors["a"]["x"]
    assert loaded.tobytes() == array.tobytes()
    assert loaded.shape == array.shape


def test_what_is_loaded_can_be_written_to(tmp_path):
    shelf.save(tmp_path)
    loaded = checkpoint.load(tmp_path).tensors["model"]["dense/bias"]
    loaded += 1
    assert (loaded == 1).all()


def test_no_groups_and_an_empty_group(tmp_path):
    checkpoint.save(tmp_path, {}, {})
    assert checkpoint.load(tmp_path).tensors == {}
    checkpoint.save(tmp_path, {"optimizer": {}}, None)
    loaded = checkpoint.load(tmp_path)
    assert (loaded.tensors, loaded.values) == ({"optimizer": {}}, None)


@pytest.mark.parametrize(
    "values",
    [{"a": [1, 2.5, None, True, "ü\n\ud800"], "b": {"c": []}}, [], 0, "x", 2**70, 0.1 + 0.2, {"": {"": 0}},
     {"b": 1, "a": 2}],
)  # fmt: skip
def test_values_come_back(tmp_path, values):
    checkpoint.save(tmp_path, {}, values)
    assert checkpoint.load(tmp_path).values == values


def test_values_come_back_as_json_has_them(tmp_path):
    # keys of numbers sort otherwise as texts, which once made a whole checkpoint look damaged
    checkpoint.save(tmp_path, {}, {"steps": {2: (1, 2), 10: "x"}, "losses": [float("inf"), float("-inf")]})
    assert checkpoint.load(tmp_path).values == {
        "steps": {"2": [1, 2], "10": "x"},
        "losses": [float("inf"), float("-inf")],
    }
    checkpoint.save(tmp_path, {}, float("nan"))
    assert np.isnan(checkpoint.load(tmp_path).values)


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


def circular():
    value = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    "values", [np.ones(2), {1, 2}, b"x", object(), {(1, 2): 3}, 1j, np.int64(3), deep(100_000), circular()],
    ids=["array", "set", "bytes", "object", "tuple as key", "complex", "NumPy integer", "deep", "circular"],
)  # fmt: skip
def test_values_that_json_cannot_hold_are_refused(tmp_path, values):
    shelf.save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="a checkpoint holds numbers, texts, lists and dicts beside its tensors"):
        checkpoint.save(tmp_path, {}, {"x": values})
    assert shelf.number_in(tmp_path) == 1


@pytest.mark.parametrize("array", [np.array([None]), np.array(["a"]), np.ones(2, "complex128"), np.zeros(2, "M8[s]")])
def test_arrays_of_anything_but_numbers_are_refused(tmp_path, array):
    # an object array would need pickle
    with pytest.raises(CheckpointError, match="the tensors of 'model' cannot be saved"):
        checkpoint.save(tmp_path, {"model": {"x": array}}, None)
    assert not checkpoint.exists(tmp_path)


@pytest.mark.parametrize("group", ["../model", "Model", "a/b", "", "a.b", "x" * 100])
def test_groups_that_could_not_be_read_again_are_refused(tmp_path, group):
    with pytest.raises(CheckpointError, match="a group of tensors is named by"):
        checkpoint.save(tmp_path / "run", {group: {}}, None)
    assert shelf.names(tmp_path) == []


def test_checkpoints_are_numbered_and_the_newest_are_kept(tmp_path):
    places = [shelf.save(tmp_path, number) for number in range(1, 5)]
    assert places == [f"{tmp_path}/checkpoint-00000{number}" for number in range(1, 5)]
    assert shelf.names(tmp_path) == ["checkpoint-000003", "checkpoint-000004"]
    assert shelf.number_in(tmp_path) == 4
    assert shelf.number_in(tmp_path / "checkpoint-000003") == 3
    shelf.save(tmp_path, 5, keep=4)
    assert len(shelf.names(tmp_path)) == 3
    shelf.save(tmp_path, 6, keep=1)
    assert shelf.names(tmp_path) == ["checkpoint-000006"]
    with pytest.raises(ConfigError, match="keep: last must be an integer of at least 1, not 0"):
        shelf.save(tmp_path, keep=0)


def test_numbers_are_compared_as_numbers(tmp_path):
    (tmp_path / "checkpoint-999999").mkdir()
    shelf.save(tmp_path, 7)
    shelf.save(tmp_path, 8)
    assert shelf.names(tmp_path) == ["checkpoint-1000000", "checkpoint-1000001"]
    assert shelf.number_in(tmp_path) == 8


def test_other_files_in_the_directory_are_left_alone(tmp_path):
    for name in ("notes.txt", "checkpoint-1", "checkpoint-abcdef", "checkpoint-000001.zip"):
        (tmp_path / name).write_text("mine")
    for number in range(4):
        shelf.save(tmp_path, number)
    assert len(shelf.names(tmp_path)) == 4 + 2
    assert shelf.number_in(tmp_path) == 3


def test_the_directory_is_made_and_its_lack_is_named(tmp_path):
    missing = tmp_path / "a" / "b"
    assert not checkpoint.exists(missing)
    with pytest.raises(CheckpointError, match=f"{missing}: there is no checkpoint here"):
        checkpoint.load(missing)
    shelf.save(missing, 1)
    assert checkpoint.exists(missing)
    assert checkpoint.exists(missing / "checkpoint-000001")


def test_the_manifest_says_what_is_inside(tmp_path):
    place = shelf.save(tmp_path)
    with open(f"{place}/manifest.json") as file:
        body = json.load(file)["body"]
    assert body["files"]["model.safetensors"]["tensors"]["dense/kernel"] == {"dtype": "float32", "shape": [2, 3]}
    assert body["values"] == {**shelf.VALUES, "number": 0}


def test_the_digest_depends_on_name_dtype_shape_and_value():
    base = {"w": np.zeros((2, 3), np.float32), "b": np.ones(3, np.float32)}
    others = [
        {},
        {"w": base["w"]},
        {**base, "c": np.zeros(0)},
        {"v": base["w"], "b": base["b"]},
        {"w": base["b"], "b": base["w"]},
        {**base, "w": base["w"].reshape(3, 2)},
        {**base, "w": base["w"].astype(np.float64)},
        {**base, "w": base["w"].view(np.int32)},
        {**base, "w": -base["w"]},  # -0.0
        {**base, "w": base["w"].reshape(2, 3, 1)},
        {**base, "s": np.zeros(())},
        {**base, "s": np.zeros(1)},
        {**base, "s": np.zeros((0, 2))},
        {**base, "s": np.zeros((2, 0))},
    ]
    assert len({checkpoint.digest(tensors) for tensors in [base, *others]}) == 1 + len(others)


def test_the_digest_does_not_depend_on_order_nor_layout():
    a, b = np.arange(6.0).reshape(2, 3), np.arange(4.0)
    expected = checkpoint.digest({"a": a, "b": b})
    assert checkpoint.digest({"b": b, "a": np.asfortranarray(a)}) == expected
    assert checkpoint.digest({"b": np.arange(8.0).repeat(1)[:4], "a": a.T.copy().T}) == expected
