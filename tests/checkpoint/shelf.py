"""Checkpoints for the tests, and ways to forge them."""

import hashlib
import json

import numpy as np

from disttrain import checkpoint
from disttrain.checkpoint import Keep
from disttrain.checkpoint.pieces import share
from disttrain.checkpoint.storage import storage
from disttrain.checkpoint.writing import write

TENSORS = {
    "model": {"dense/kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "dense/bias": np.zeros(3, np.float16)},
    "optimizer": {"dense/kernel/velocity": np.full((2, 3), 1e-7)},
}
VALUES = {"epoch": 3, "history": {"loss": [0.5, 1e-07]}, "name": "Zoë"}


def save(path, number=0, **kwargs):
    """Save `TENSORS`, marked with a number, and return the checkpoint's directory."""
    return checkpoint.save(path, numbered(number), {**VALUES, "number": number}, **kwargs)


def numbered(number):
    """Return `TENSORS` and the number."""
    return {**TENSORS, "model": {**TENSORS["model"], "number": np.array(number)}}


def save_by_two(path, number=0, **kwargs):
    """Save the same as two ranks do, one after the other in this thread: the second writes when the draft is there."""
    shared = [share(kwargs.get("tensors") or numbered(number), rank, 2) for rank in range(2)]
    place = storage(path)
    make_draft = place.make_draft

    def made(token, name):
        folder = make_draft(token, name)
        write(storage(path), shared[1], keep=Keep(), token=token, rank=1, writers=2)
        return folder

    place.make_draft = made
    keep = Keep(last=kwargs.get("keep", 2))
    return write(place, shared[0], {**VALUES, "number": number}, keep=keep, writers=2)


def number_in(path):
    """Return the number of the checkpoint that is loaded from `path`, after finding all of it in order."""
    loaded = checkpoint.load(path)
    number = loaded.values.pop("number")
    assert loaded.values == VALUES
    assert loaded.tensors["model"].pop("number") == number
    assert {g: set(a) for g, a in loaded.tensors.items()} == {g: set(a) for g, a in TENSORS.items()}
    for group, arrays in TENSORS.items():
        for name, array in arrays.items():
            np.testing.assert_array_equal(loaded.tensors[group][name], array, strict=True)
    return number


def forge(directory, change):
    """Let `change` alter the body of a manifest, and give it the right hash."""
    path = directory / "manifest.json"
    body = json.loads(path.read_bytes())["body"]
    body = change(body) or body
    text = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    path.write_bytes(json.dumps({"sha256": hashlib.sha256(text).hexdigest(), "body": body}, indent=1).encode())


def names(path):
    """Return what lies in the directory, the lock left out."""
    return sorted(entry.name for entry in path.iterdir() if entry.name != ".lock")
