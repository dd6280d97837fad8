"""Gives files and messages made to run code to all that reads such: ``python tripwire.py FOLDER``; prints what ran.

An audit hook hears what Python does meanwhile. It cannot be taken away, so this is a process of its own.
"""

import codecs
import contextlib
import gzip
import hashlib
import io
import json
import marshal
import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

import disttrain as dt
from disttrain import progress
from disttrain.checkpoint.format import decode_tensors
from disttrain.comm import costs, rendezvous, threads
from disttrain.comm.frames import _Inbox
from disttrain.errors import DisttrainError
from disttrain.last_step import LastStep
from disttrain.training.remembering import _unpacked
from launch import report
from tests.checkpoint import shelf
from tests.training import worlds

for encoding in ("utf_16_be", "utf_16_le", "utf_32_be", "utf_32_le"):  # that JSON may be in
    codecs.lookup(encoding)
FOLDER = Path(sys.argv[1])
LAST = LastStep.make()
HARM = ("exec", "compile", "import", "os.system", "subprocess.", "socket.connect", "socket.bind", "pickle.", "marshal.",
        "os.exec", "os.fork", "os.mkdir", "os.remove", "os.rename", "os.chmod", "ctypes.dlopen", "shutil.")  # fmt: skip
# What a reader may raise beside disttrain's errors, where only those who know the job's secret are heard.
AS_OF_A_RANK = (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, struct.error, OSError,
                SafetensorError)  # fmt: skip

heard = []
reader = ""


def hear(event, args):
    if reader and (event.startswith(HARM) or (event == "open" and is_to_write(args))):
        heard.append([reader, event, repr(args)[:200]])


def is_to_write(args):
    return isinstance(args[0], str) and bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


class Harm:
    def __reduce__(self):
        return os.mkdir, (str(FOLDER / "harm"),)


def payloads():
    """Yield contents that would run code where something unpickled, imported, unpacked or evaluated them."""
    pickles = [pickle.dumps(Harm(), protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    yield from pickles
    objects = io.BytesIO()
    np.save(objects, np.array([Harm()], object), allow_pickle=True)
    yield objects.getvalue()
    for name in ("archive/data.pkl", "x.npy", "../../x.npy", "__main__.py"):  # of torch, of NumPy, of Python
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr(name, objects.getvalue() if name.endswith("npy") else pickles[2])
        yield archive.getvalue()
    code = compile(f"import os; os.mkdir({str(FOLDER / 'harm')!r})", "x", "exec")
    yield marshal.dumps(code)
    yield b"\xa7\r\r\n" + bytes(12) + marshal.dumps(code)  # as a .pyc begins
    yield gzip.compress(pickles[2])
    yield b"\x89HDF\r\n\x1a\n" + pickles[2]
    texts = [
        f"__import__('os').mkdir({str(FOLDER / 'harm')!r})",
        f"!!python/object/apply:os.mkdir [{FOLDER}/harm]",
        f"import os\nos.mkdir({str(FOLDER / 'harm')!r})\n",
        json.dumps({"py/reduce": [{"py/function": "os.mkdir"}, {"py/tuple": [str(FOLDER / "harm")]}]}),
        json.dumps({"py/object": "os.system", "__class__": "os.system", "__module__": "antigravity"}),
        json.dumps([[0, 0], "differ", [[0, ["os.mkdir", "x"]]]]),
        json.dumps([[0, 0], "waits", [[0, [1, "antigravity", "object", [1], "", 0, ""]]]]),
        "[" * 3000 + "]" * 3000,
    ]
    yield from (text.encode() for text in texts)


class Bytes:
    """A pipe with the bytes that another rank has sent."""

    def __init__(self, data):
        self.left = np.frombuffer(data, np.uint8)

    def read(self, into):
        count = min(into.size, self.left.size)
        into[:count], self.left = self.left[:count], self.left[count:]
        return count


def load(content, name):
    """Load a checkpoint in which a file is replaced, with hashes that are right."""
    place = FOLDER / "run" / "checkpoint-000001"
    for each, whole in WHOLE.items():
        (place / each).write_bytes(whole)
    (place / name).write_bytes(content)
    if name != "manifest.json":
        described = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        shelf.forge(place, lambda body: body["files"][name].update(described))
    return lambda: dt.load_model(FOLDER / "run")


def load_described(text):
    """Load a model whose description holds a text in every place where a class or a function could be named."""
    place = FOLDER / "run" / "checkpoint-000001"
    for each, whole in WHOLE.items():
        (place / each).write_bytes(whole)

    def describe(body):
        described = body["values"]["model"]
        layer = described["config"]["layers"][-1]
        for where, key in ((described, "class"), (layer, "class"), (layer["config"], "activation"))[
            : len(text) % 3 + 1
        ]:
            where[key] = text

    shelf.forge(place, describe)
    return lambda: dt.load_model(FOLDER / "run")


def hear_frame(content):
    inbox = _Inbox(Bytes(struct.pack("<qq", 0, len(content)) + content), 1, 1 << 16)
    threads.run(1, lambda comm: hear_told(comm, inbox.next()))


def hear_told(comm, content):
    comm._told = iter([(0, content), None]).__next__
    comm.listen()


def receive_json(content):
    here, there = rendezvous.socket.socketpair()
    with here, there:
        here.sendall(struct.pack("<I", len(content)) + content)
        rendezvous._receive_json(there, 1 << 16)


def greet(content):
    here, there = rendezvous.socket.socketpair()
    with here, there:
        here.sendall(content)
        rendezvous._Greeting(there, "").read([rendezvous.Claim(1, 0, 0)], rendezvous.Pass(secret=b"x", job="x"))


def read_memory(content):
    LAST.write(1, [content])
    _unpacked(LAST.read()[1])


def in_file(name, content, read):
    (FOLDER / name).write_bytes(content)
    return lambda: read()


def readings(content):
    """Yield what reads `content`, by name, and what it may raise; files are written before."""
    text = content.decode(errors="replace")
    for name in ("manifest.json", "model.safetensors", "optimizer.safetensors"):
        yield f"load_model, {name}", load(content, name), (DisttrainError,)
    yield "load_model, a name in it", load_described(text), (DisttrainError,)
    yield "tensors", lambda: decode_tensors(content), (DisttrainError, *AS_OF_A_RANK)
    yield "control message", lambda: hear_frame(content), (DisttrainError, *AS_OF_A_RANK)
    yield "rendezvous", lambda: receive_json(content), (DisttrainError, *AS_OF_A_RANK)
    yield "greeting", lambda: greet(content), (DisttrainError, rendezvous._RefusedError)
    yield "memory of a step", lambda: read_memory(content), (DisttrainError, *AS_OF_A_RANK)
    yield "progress", in_file("progress.0", content, lambda: progress.read(FOLDER / "progress.0")), AS_OF_A_RANK
    yield "report", in_file("report.0.json", content, lambda: report.read_reports(FOLDER)), AS_OF_A_RANK
    kept = costs._path(FOLDER, "tcp", ["a"]).name
    yield "costs", in_file(kept, content, lambda: costs.cached(FOLDER, "tcp", ["a"])), ()


worlds.dense_net().save(FOLDER / "run")
WHOLE = {path.name: path.read_bytes() for path in (FOLDER / "run" / "checkpoint-000001").iterdir()}
counts = {}
sys.addaudithook(hear)
for is_rehearsal in (True, False):  # what is imported at first use is not because of what is read
    for number, content in enumerate([b"{}", WHOLE["model.safetensors"]] if is_rehearsal else payloads()):
        for name, read, errors in readings(content):
            reader = "" if is_rehearsal else f"{name}, payload {number}"
            with contextlib.suppress(errors):
                read()
            reader = ""
            counts[name] = counts.get(name, 0) + 1
reader = "control"
pickle.loads(pickle.dumps(Harm()))
reader = ""
print(json.dumps({"counts": counts, "heard": heard}))
