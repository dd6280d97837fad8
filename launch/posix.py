"""Signals and families of processes: what the supervisor asks of the system."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import psutil

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


@contextlib.contextmanager
def caught_signals() -> Iterator[int]:
    """Catch the signals that a supervisor is sent; yield a descriptor that carries their numbers.

    After one that asks for the end, further ones are ignored when the block is left: the process is about to end as it
    was asked to, with its own exit code.
    """
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        numbers.append(signal.SIGHUP)
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    came: set[int] = set()
    before = {number: signal.signal(number, lambda number, _: came.add(number)) for number in numbers}
    try:
        yield reader.fileno()
    finally:
        is_ending = bool(came - {signal.SIGUSR2, signal.SIGCHLD})
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if is_ending and number != signal.SIGCHLD else handler)
        signal.set_wakeup_fd(wakeup)
        reader.close()
        writer.close()


def adopt_orphans() -> None:
    """Become the parent of every descendant that loses its own: none escapes `signal_family`."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Have this process receive a signal when its parent dies, even by SIGKILL."""
    _prctl(_PR_SET_PDEATHSIG, number)


def remove_after_death(folder: Path) -> None:
    """Have `folder` removed when this process has ended, even by SIGKILL, which may be sent to its whole group."""
    reader, _ = os.pipe()  # nobody writes: it ends with this process
    text = 'exec 3<&0; { trap "" INT TERM; read _; rm -rf "$0"; } <&3 3<&- &'
    subprocess.run(
        ("/bin/sh", "-c", text, folder),
        stdin=reader,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        check=True,
    )
    os.close(reader)


def signal_family(number: signal.Signals) -> None:
    """Send a signal to all descendants of this process, whatever session they are in."""
    for member in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(number)


def await_family(timeout_s: float, *, but: Collection[int]) -> None:
    """Wait until all descendants of this process have ended, except the pids `but`."""
    end_s = time.monotonic() + timeout_s
    while members := [each.pid for each in psutil.Process().children(recursive=True) if each.pid not in but]:
        for pid in members:
            with contextlib.suppress(ChildProcessError):  # not ours, or not yet
                os.waitpid(pid, os.WNOHANG)
        if time.monotonic() >= end_s:
            return
        time.sleep(0.005)


def state(pid: int) -> str:
    """Return the state of a process, one of psutil's words; empty when it has ended."""
    try:
        found = psutil.Process(pid).status()
    except psutil.Error:
        return ""
    return "" if found in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else str(found)


def effort(pid: int) -> object:
    """Return what a process and its descendants have used of processor and disk: equal when they have done nothing."""
    used = []
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                used.append((each.pid, each.cpu_times()[:2], each.io_counters()))
    return used


def kernel_words(pid: int) -> str:
    """Return what the kernel tells of a process which does not answer, as in ``T (stopped), in do_signal_stop``."""
    found = []
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text()
        found += [line.partition(":")[2].strip() for line in status.splitlines() if line.startswith("State:")]
    with contextlib.suppress(OSError):
        place = Path(f"/proc/{pid}/wchan").read_text()
        found += [f"in {place}"] if place.strip("0") else []
    return ", ".join(found) or "nothing is known of it"


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
