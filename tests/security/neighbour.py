"""Another user of the node: ``python neighbour.py UID FOLDER PID...`` tries, as UID, what it must not be able to do.

Args:
    UID: it becomes this user after it has imported what it needs; 0: it stays who it is.
    FOLDER: in which the job has its private folder.
    PID: of the job's processes.

It writes a JSON object: by attack, what came of it, ``"done"`` where it has succeeded.
"""

import ctypes
import json
import os
import signal
import sys
from pathlib import Path

PTRACE_SEIZE, PTRACE_DETACH = 0x4206, 17
libc = ctypes.CDLL(None, use_errno=True)
outcomes = {}


def attempt(name, function, *args):
    """Note what comes of ``function(*args)``: of several attempts under one name the best."""
    if outcomes.get(name) == "done":
        return
    try:
        function(*args)
        outcomes[name] = "done"
    except OSError as error:
        outcomes[name] = os.strerror(error.errno)


def read(path):
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        os.read(descriptor, 1)
    except BlockingIOError:
        pass
    finally:
        os.close(descriptor)


def write(path):
    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))


def call(function, *args):
    if function(*args) < 0:
        raise OSError(ctypes.get_errno(), "")


def attach(pid):
    call(libc.ptrace, PTRACE_SEIZE, pid, 0, 0)
    os.kill(pid, signal.SIGSTOP)  # it is let go only when it stands still
    os.waitpid(pid, 0x40000000)
    call(libc.ptrace, PTRACE_DETACH, pid, 0, 0)
    os.kill(pid, signal.SIGCONT)


def peek(pid, address):
    class Part(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

    here = ctypes.create_string_buffer(8)
    local, remote = Part(ctypes.addressof(here), 8), Part(address, 8)
    call(libc.process_vm_readv, pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)


def attack_folder(folder, ranks):
    attempt("list the job's folder", os.listdir, folder)
    attempt("plant a file there", lambda: (folder / "planted").touch())
    attempt("plant an answer of a rank", lambda: (folder / "exchange.9.1").symlink_to("/etc/passwd"))
    for rank in range(ranks):
        for name in ("out", "err", "alive", "progress", "stacks", "exchange.0"):
            attempt(f"read {name}", read, folder / f"{name}.{rank}")
            attempt(f"write {name}", write, folder / f"{name}.{rank}")


def attack_process(pid, address, numbers):
    process = Path(f"/proc/{pid}")
    attempt("read an environment", read, process / "environ")
    attempt("read memory", read, process / "maps")
    attempt("peek into memory", peek, pid, address)
    attempt("list descriptors", os.listdir, process / "fd")
    for number in numbers:
        attempt("read what is shared", read, process / "fd" / str(number))
        attempt("write what is shared", write, process / "fd" / str(number))
    attempt("attach", attach, pid)
    attempt("signal", os.kill, pid, 0)


def main(uid, place, *pids):
    (folder,) = place.glob("disttrain-*")
    shared = {pid: [int(each.name) for each in Path(f"/proc/{pid}/fd").iterdir() if is_shared(each)] for pid in pids}
    address = {pid: int(Path(f"/proc/{pid}/maps").read_text().partition("-")[0], 16) for pid in pids}
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    outcomes["see the folder's name"] = "done" if folder.name in os.listdir(place) else "no"
    attack_folder(folder, 2)
    for pid in pids:
        attack_process(pid, address[pid], shared[pid])
    print(json.dumps(outcomes))


def is_shared(path):
    try:
        return os.readlink(path).startswith("/memfd:")
    except OSError:
        return False


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
