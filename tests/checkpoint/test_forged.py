"""A checkpoint made to do harm: with hashes that are right, it reads nothing else, runs nothing, takes no memory."""

import hashlib
import json
import os
import pickle
import resource
import struct
import subprocess
import sys

import pytest

from disttrain import checkpoint
from disttrain.errors import CheckpointDamagedError
from tests.checkpoint import shelf

pytestmark = pytest.mark.timeout(20)


@pytest.fixture
def forged(tmp_path):
    """Return the directory of a checkpoint that stands alone, so that nothing is used instead."""
    shelf.save(tmp_path, 1)
    return tmp_path / "checkpoint-000001"


def refused(path):
    """Return the message with which the checkpoint is refused."""
    with pytest.raises(CheckpointDamagedError) as caught:
        checkpoint.load(path.parent)
    return str(caught.value)


def put(forged, content, name="model.safetensors"):
    """Replace a file and what the manifest says of it."""
    (forged / name).write_bytes(content)

    def describe(body):
        body["files"][name].update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    shelf.forge(forged, describe)


def rename(forged, name):
    def change(body):
        body["files"][name] = body["files"].pop("model.safetensors")

    shelf.forge(forged, change)


def test_a_forgery_without_harm_is_loaded(forged):
    # so that the tests below fail for their own reasons
    put(forged, (forged / "model.safetensors").read_bytes())
    assert shelf.number_in(forged.parent) == 1


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/passwd", "a/../../x.safetensors", "..", "", ".", "manifest.json", "x.safetensors\n",
     "model.safetensors\0", "MODEL.safetensors", "~/x.safetensors", "x" * 5000 + ".safetensors", "a\\b.safetensors"],
)  # fmt: skip
def test_a_manifest_reads_no_file_but_its_own(forged, name, monkeypatch):
    opened = set()
    real = os.open
    rename(forged, name)
    monkeypatch.setattr(os, "open", lambda path, *args, **kwargs: opened.add(str(path)) or real(path, *args, **kwargs))
    text = refused(forged)
    assert "which is not one of a checkpoint" in text
    assert len(text) < 1000
    assert opened <= {str(forged.parent), str(forged), "manifest.json", "optimizer.safetensors"}


def test_a_link_is_not_followed(forged, tmp_path):
    content = forged / "model.safetensors"
    elsewhere = tmp_path / "elsewhere"
    content.rename(elsewhere)
    content.symlink_to(elsewhere)
    assert "model.safetensors: cannot be read: Too many levels of symbolic links" in refused(forged)


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors"])
@pytest.mark.parametrize("has_writer", [False, True])
def test_a_pipe_is_not_waited_for(forged, name, has_writer):
    (forged / name).unlink()
    os.mkfifo(forged / name)
    writer = os.open(forged / name, os.O_RDWR) if has_writer else None
    try:
        assert name in refused(forged)
    finally:
        if writer is not None:
            os.close(writer)


@pytest.mark.parametrize("size", [2**40, 2**62, 2**64, 10**30, 1e300])
def test_a_size_that_the_manifest_makes_up_takes_no_memory(forged, size):
    # with half a GiB more than what is in use: the attempt to take it would fail
    shelf.forge(forged, lambda body: body["files"]["model.safetensors"].update(bytes=size))
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, hard))
    try:
        assert shelf.number_in(forged.parent) == 1  # the hash is what counts, and it is right
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("size", [0, -1, 10, "x", None, [], 1e400])
def test_a_size_that_does_not_fit_is_named(forged, size):
    shelf.forge(forged, lambda body: body["files"]["model.safetensors"].update(bytes=size))
    assert "model.safetensors" in refused(forged) or "manifest.json" in refused(forged)


def test_a_large_file_is_not_read(forged):
    with open(forged / "model.safetensors", "r+b") as file:
        file.truncate(2**40)  # of holes
    assert "1099511627776 bytes, at most" in refused(forged)
    with open(forged / "manifest.json", "r+b") as file:
        file.truncate(2**40)
    assert "1099511627776 bytes, at most 67108864 expected" in refused(forged)


@pytest.mark.parametrize(
    "content",
    [b"", b"x", b"[]", b"null", b"{}", b"1e999", b"\xff\xfe", b"\0" * 100, b'{"body": 1}',
     b'{"sha256": 1, "body": NaN}', b"[" * 200_000,
     b'{"a":' * 200_000, b'{"body":' + b"[" * 3000 + b"]" * 3000 + b',"sha256":"x"}', b"9" * 10_000],
    ids=["empty", "text", "list", "null", "dict", "number", "UTF-16", "zeros", "no hash", "NaN", "deep list",
         "deep dict", "deep body", "digits"],
)  # fmt: skip
def test_what_is_no_manifest_is_named(forged, content):
    (forged / "manifest.json").write_bytes(content)
    text = refused(forged)
    assert "manifest.json" in text
    assert len(text) < 1000


def described(**change):
    return lambda body: body["files"]["model.safetensors"].update(change)


@pytest.mark.parametrize(
    "change",
    [lambda body: [1], lambda body: "x", lambda body: {**body, "files": [1, 2]}, lambda body: {**body, "files": None},
     lambda body: {**body, "files": {"model.safetensors": 5}},
     lambda body: {**body, "files": {"model.safetensors": {}}},
     lambda body: {k: v for k, v in body.items() if k != "files"}, described(sha256=5), described(sha256=None)],
)  # fmt: skip
def test_a_manifest_of_another_shape_is_named(forged, change):
    shelf.forge(forged, change)
    assert "manifest" in refused(forged)


class Harm:
    def __reduce__(self):
        return os.mkdir, (os.environ["HARM"],)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_in_place_of_tensors_is_not_run(forged, tmp_path, monkeypatch, protocol):
    monkeypatch.setenv("HARM", str(tmp_path / "harm"))
    put(forged, pickle.dumps(Harm(), protocol))
    assert "model.safetensors: not a safetensors file" in refused(forged)
    assert not (tmp_path / "harm").exists()
    pickle.loads((forged / "model.safetensors").read_bytes())  # it would have
    assert (tmp_path / "harm").exists()


def test_saving_and_loading_pickle_nothing(tmp_path):
    code = (
        "import pickle, sys; from tests.checkpoint import shelf; seen = [];"
        "sys.addaudithook(lambda event, args: seen.append(event) if event.startswith('pickle.') else None);"
        "shelf.save(sys.argv[1], 1); shelf.number_in(sys.argv[1]); print(seen);"
        "pickle.loads(pickle.dumps(print)); print(seen)"  # a control: the hook does hear
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "['pickle.find_class']"]


def tensors(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"x": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff" * 8, struct.pack("<Q", 2**63), tensors(b"["), tensors([]), tensors({"x": 1}),
     tensors(entry(shape=(2**40,)), b"1234"), tensors(entry(offsets=(0, 2**50)), b"1234"),
     tensors(entry(offsets=(4, 0)), b"1234"), tensors(entry(shape=(2**32, 2**32)), b"1234"),
     tensors(entry("F128"), b"1234"), tensors(entry("BF16", (2,)), b"1234"),
     tensors(entry("F8_E4M3", (4,)), b"1234"), tensors(entry(), b"1234rest"), tensors(b"[" * 100_000)],
)  # fmt: skip
def test_tensors_that_are_none_are_named(forged, content):
    put(forged, content)
    assert "model.safetensors: not a safetensors file" in refused(forged)
