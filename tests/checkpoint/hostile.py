"""Loads checkpoints that were altered at random: `python hostile.py EXAMPLES FOLDER`, and fails at the first harm.

The process may take 256 MiB more than it has at the beginning. Harm is anything but an error of disttrain's: another
exception, memory, a file opened for writing or outside of the checkpoint, code that is run, a connection.
"""

import hashlib
import json
import os
import resource
import struct
import sys
from pathlib import Path

from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from disttrain import checkpoint
from disttrain.errors import DisttrainError
from launch.cli import main
from tests.checkpoint import shelf

ROOM_BYTES = 256 << 20
FORBIDDEN = ("exec", "compile", "import", "os.system", "subprocess.", "socket.", "pickle.", "marshal.", "os.exec",
             "os.fork", "ctypes.", "shutil.", "os.remove", "os.rename", "os.mkdir", "os.symlink", "os.link",
             "os.truncate", "os.chmod")  # fmt: skip
FOLDER = Path(sys.argv[2])
RUN = FOLDER / "run"
NAMES = ["../x.safetensors", "/etc/passwd", "a/../../b.safetensors", "model.safetensors", "model.0.safetensors", "",
         "model.1.safetensors", "model.safetensors\0", ".", "manifest.json", "x" * 4096,
         "link.safetensors"]  # fmt: skip

harm = []
is_loading = False


def hook(event, args):
    if not is_loading:
        return
    if event == "open":
        path, mode, flags = args
        is_written = bool(flags and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        name = str(path)
        # relative to the checkpoint's own directory, without following links: see storage.py
        is_ours = isinstance(path, int) or name.startswith(str(RUN)) or "/" not in name
        if is_written or not is_ours:
            harm.append((event, name, mode, flags))
    elif event.startswith(FORBIDDEN):
        harm.append((event, args))


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.sampled_from([0, 1, -1, 2**31, 2**53, 2**63, 2**64]),
    st.floats(), st.text(max_size=8), st.sampled_from(NAMES), st.sampled_from(["float32", "F32", "BF16", "object"]),
)  # fmt: skip
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=4), v, max_size=3), max_leaves=8
)


def places(value, path=()):
    """Yield the path of everything inside a JSON value."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from places(each, (*path, key))


def altered(data, value):
    """Return a JSON value with one to three places replaced, removed or renamed."""
    value = json.loads(json.dumps(value))
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from([p for p in places(value) if p] or [()]))
        if not path:
            return data.draw(values)
        inner = value
        for key in path[:-1]:
            inner = inner[key]
        what = data.draw(st.sampled_from(["replace", "remove", "rename"]))
        if what == "replace":
            inner[path[-1]] = data.draw(values)
        elif what == "rename" and isinstance(inner, dict):
            inner[data.draw(st.sampled_from(NAMES) | st.text(max_size=4))] = inner.pop(path[-1])
        else:
            del inner[path[-1]]
    return value


def damaged(data, content):
    """Return bytes with some altered, put in or left out."""
    content = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, max(len(content) - 1, 0)))
        length = data.draw(st.integers(0, 9))
        content[place : place + length] = data.draw(st.binary(max_size=9))
    return bytes(content)


def put_manifest(place, body):
    text = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    manifest = {"sha256": hashlib.sha256(text).hexdigest(), "body": body}
    (place / "manifest.json").write_bytes(json.dumps(manifest, indent=1).encode())


def alter(data):
    """Alter the newest checkpoint, mostly with hashes that are right, so that what is behind them is reached."""
    place = RUN / "checkpoint-000001"
    for name, content in WHOLE.items():
        (place / name).write_bytes(content)
    body = json.loads(WHOLE["manifest.json"])["body"]
    kind = data.draw(st.sampled_from(["manifest", "manifest bytes", "header", "tensors bytes"]))
    if kind == "manifest":
        put_manifest(place, altered(data, body))
    elif kind == "manifest bytes":
        (place / "manifest.json").write_bytes(damaged(data, WHOLE["manifest.json"]))
    else:
        name = data.draw(st.sampled_from(sorted(WHOLE.keys() - {"manifest.json"})))
        content = WHOLE[name]
        if kind == "header":
            size = int.from_bytes(content[:8], "little")
            text = json.dumps(altered(data, json.loads(content[8 : 8 + size]))).encode()
            length = data.draw(st.sampled_from([len(text)] * 5 + [0, 2**31, 2**63, 2**64 - 1]))
            content = struct.pack("<Q", length) + text + content[8 + size :]
        else:
            content = damaged(data, content)
        (place / name).write_bytes(content)
        body["files"][name].update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        put_manifest(place, body)


counts = {"loaded": 0, "refused": 0}


@settings(
    max_examples=int(sys.argv[1]), deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(st.data())
def load(data):
    global is_loading
    alter(data)
    is_loading = True
    try:
        checkpoint.load(RUN)
        counts["loaded"] += 1
    except DisttrainError:
        counts["refused"] += 1
    finally:
        is_loading = False
    assert not harm, harm
    for command in ("ls", "show", "verify"):
        done = CliRunner().invoke(main, ["ckpt", command, str(RUN)])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception


shelf.save_by_two(RUN, 1)
WHOLE = {path.name: path.read_bytes() for path in (RUN / "checkpoint-000001").iterdir()}
(RUN / "checkpoint-000001" / "link.safetensors").symlink_to(__file__)
assert checkpoint.load(RUN).values["number"] == 1
sys.addaudithook(hook)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + ROOM_BYTES, resource.RLIM_INFINITY))
load()
assert sorted(path.name for path in FOLDER.iterdir()) == ["run"]
assert sorted(path.name for path in RUN.iterdir()) == [".lock", "checkpoint-000001"]
print(json.dumps(counts))
