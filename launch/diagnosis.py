"""Diagnosis: a finding of the watch in words: who, where, for how long, its stack, the others, and what to try."""

import socket
from collections.abc import Mapping
from pathlib import Path

from disttrain.progress import Record
from launch import memory, posix, stacks
from launch.watch import BUSY, IDLE, STACKS, STEPS, Finding, Sight

HUNG = 124  # the exit code of a job that was ended so, as of `timeout`

_WHAT = {
    "stopped": "is stopped by a signal",
    "stuck": "is stuck",
    "gone": "has left the job, and the others wait for it",
    "differs": "waits in another call than the others",
    "silence": "all ranks here wait, in the same call, and nothing arrives",
}
_TRY = {
    "stopped": "kill -CONT {pid} lets a stopped process go on; debuggers, Ctrl-Z and schedulers stop processes",
    "stuck": "the stack says where; if that may take so long, allow it: disttrain run --hang-timeout SECONDS",
    "gone": "look for a return, sys.exit() or os._exit() of this rank alone: all must make the same collectives",
    "differs": "look for a collective, fit(), evaluate(), predict() or save() that not all ranks come to",
    "silence": "look at the network between the hosts, and at the ranks elsewhere",
}


def hang_in_words(finding: Finding, sights: Mapping[int, Sight], workers: int, folder: Path) -> str:
    """Return the report of `finding`; the stacks that ranks have written are in `folder`."""
    host = socket.gethostname()
    frames = {rank: stacks.read(folder / STACKS.format(rank)) for rank in sights}
    where = {rank: place for rank in sights if (place := stacks.place(frames[rank]))}
    limit = f"for {finding.for_s:.1f} s, of at most {finding.limit_s:.1f}"
    rank = finding.rank
    if rank is None:
        text = f"disttrain: {_WHAT[finding.kind]}, on host {host}, {limit}\n"
    else:
        sight = sights[rank]
        text = (
            f"disttrain: rank {rank} of {workers} {_WHAT[finding.kind]}, on host {sight.record.host}, "
            f"pid {sight.record.pid}, "
            f"{limit}: {sight.record.words}{at(where, rank)}\n"
        )
        if frames[rank]:
            text += stacks.as_traceback(frames[rank])
        elif not sight.has_left:
            text += f"It does not tell its stack: {_kernel_words(sight.record)}\n"
    text += others_in_words(sights, workers, rank, where)
    return text + _hint(finding, sights)


def others_in_words(
    sights: Mapping[int, Sight], workers: int, but: int | None, where: Mapping[int, str] | None = None
) -> str:
    """Return a line for each place at which ranks are, except rank `but`; none where nothing is known of any."""
    places: dict[str, list[int]] = {}
    for rank in range(workers):
        if rank != but:
            places.setdefault(_doing(sights.get(rank)) + at(where or {}, rank), []).append(rank)
    if not sights:
        return ""
    return "".join(f"Meanwhile {_ranks(ranks)}: {words}\n" for words, ranks in places.items())


def last_words(sights: Mapping[int, Sight], rank: int | None) -> str:
    """Return where `rank`, which has ended without a word, was according to its record; empty where it has none."""
    sight = None if rank is None else sights.get(rank)
    return "" if sight is None else f"It was at: {sight.record.words}; its pid was {sight.record.pid}\n"


def at(where: Mapping[int, str], rank: int) -> str:
    """Return the place of `rank` in its code, to be appended; empty where it is not known."""
    return f", at {where[rank]}" if rank in where else ""


def memory_in_words(kills_before: int) -> str:
    """Return what is known of lacking memory, given `memory.kills` at the job's begin; empty where nothing is."""
    if memory.kills() <= kills_before:
        return ""
    limit = memory.limit_bytes()
    of = "" if limit is None else f"; the cgroup may use {limit / 2**20:.0f} MiB"
    return f"the kernel has ended a process for lack of memory during this job{of}"


def _doing(sight: Sight | None) -> str:
    if sight is None:
        return "has not started, or is on another host"
    return f"{sight.record.words}{'; it is stopped' if sight.is_stopped else ''}"


def _kernel_words(record: Record) -> str:
    return posix.kernel_words(record.pid) if record.proxy is None else record.proxy.kernel


def _ranks(ranks: list[int]) -> str:
    """Return ranks as in ``ranks 0, 2-5``."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"


def _hint(finding: Finding, sights: Mapping[int, Sight]) -> str:
    pid = "PID" if finding.rank is None else sights[finding.rank].record.pid
    hint = _TRY[finding.kind].format(pid=pid)
    if finding.in_step and finding.kind == "stuck":
        hint += f" (or {STEPS} median steps, which is more where steps are long)"
    elif finding.kind == "stuck":
        hint += f" (outside of steps {IDLE} times as long is allowed, {BUSY} times while it uses processor or disk)"
    return f"Try: {hint}\n"
