"""What every rank runs: `python -m launch.worker script.py args...`.

The script runs as `python script.py` would run it. When it fails, the rank leaves a report for the
supervisor and ends the whole job, so that no other rank waits for it.
"""

import atexit
import builtins
import contextlib
import faulthandler
import importlib
import io
import os
import signal
import socket
import sys
import time
import traceback
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from disttrain import env, progress
from disttrain.errors import PREEMPTED, DeadRankError, Preempted
from launch.report import Report
from launch.watch import RECORD, STACKS

PIPES = ("out", "err", "alive")  # of each rank; its supervisor made them in the job's folder
_LINE_LENGTH = 120
# the last word on `alive`; after EXITED the exit code; BEREFT: it has lost another rank, and cannot go on alone
DONE, FAILED, INTERRUPTED, EXITED, BEREFT = b".", b"!", b"^", b"x", b"-"


def main(argv: Sequence[str]) -> None:
    """Run the script ``argv[0]`` with the arguments that follow it; return when it succeeded, else end the job."""
    failure = serve(argv)
    if failure is not None:
        report, is_told = failure
        if report.exit_code == PREEMPTED and report.rank and not is_told:
            return  # a launcher elsewhere would end those that are not so far because of the code; rank 0 has it
        if not is_told:
            sys.stderr.write(report.text + ("" if report.text.endswith("\n") else "\n"))
        _end_job(report.exit_code, is_told=is_told)


def serve(argv: Sequence[str]) -> tuple[Report, bool] | None:
    """Run a script as a rank of the job, whose supervisor, where it is in reach, sees and hears of it.

    Returns:
        None when the script succeeded; else its report, and whether the supervisor knows of it.
    """
    place = env.place()
    env.withhold_last_step()
    folder = os.environ.get(env.JOB_DIR)
    alive = _join_supervisor(Path(folder), place.rank) if folder else None
    if alive is None and env.supervisor():
        importlib.import_module("launch.stand_in").run(argv)
    os.environ.pop(env.SUPERVISOR, None)  # a job that the script starts has one of its own
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Whole lines, as on a terminal. PYTHONUNBUFFERED would write each print in two pieces.
            stream.reconfigure(line_buffering=True, write_through=False)
    faulthandler.enable()
    last_words = [b""]  # an actor's process also ends, through its exit handlers, when its node does
    atexit.register(lambda: _say(alive, *last_words))  # the first to be registered is the last to run
    try:
        if alive is not None:
            _be_watched(Path(folder or ""), place)
            os._exit = _telling_exit(alive)  # type: ignore[assignment]  # the argument's name is its own affair
        _run(argv)
    except KeyboardInterrupt as error:
        _say(alive, INTERRUPTED)
        return _report(error, place, 128 + signal.SIGINT, time.monotonic()), True
    except DeadRankError as error:
        _say(alive, BEREFT)  # and leave no report: it is the other's end that counts
        return _report(error, place, 128 + signal.SIGKILL, time.monotonic()), alive is not None
    except BaseException as error:
        if isinstance(error, Preempted):  # what it was asked for may be asked again, by Slurm and by its srun
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, signal.SIG_IGN)
        time_s = time.monotonic()
        code = _exit_code(error)
        if code:
            report = _report(error, place, code, time_s)
            is_told = _leave(report, folder) and alive is not None  # else there is a folder, and nobody who looks
            if alive is not None and not is_told:  # no room for it: the text alone, before the word that ends the job
                sys.stderr.write(report.text)
                sys.stderr.flush()
                is_told = True
            _say(alive, FAILED)
            return report, is_told
    last_words[0] = DONE
    progress.at(progress.Phase.SHUTDOWN)
    return None


def _join_supervisor(folder: Path, rank: int) -> int | None:
    """Write to the supervisor's pipes from now on; return the one that closes when this process ends.

    Returns:
        None where they are out of reach, as on another host: the launcher's own outputs serve then.
    """
    try:
        out, err, alive = (os.open(folder / f"{name}.{rank}", os.O_WRONLY | os.O_NONBLOCK) for name in PIPES)
    except OSError:
        return None
    for pipe, target in ((out, 1), (err, 2)):
        os.set_blocking(pipe, True)
        os.dup2(pipe, target)
        os.close(pipe)
    return alive


def _be_watched(folder: Path, place: env.Place) -> None:
    """Keep a record of this rank's progress, and leave all Python stacks in a file when the supervisor asks for them.

    The stacks come from a signal handler in C, which no endless loop and no lock of the interpreter holds up.
    """
    progress.keep(folder / RECORD.format(place.rank), place.rank, place.world_size)
    stacks = open(folder / STACKS.format(place.rank), "w")  # noqa: SIM115 - open until the end
    faulthandler.register(signal.SIGUSR2, file=stacks)


def _telling_exit(alive: int) -> Callable[[int], NoReturn]:
    """Return `os._exit`, which tells the supervisor first.

    A launcher that ends the other ranks because of it may tell only of these.
    """
    leave, pid = os._exit, os.getpid()

    def _exit(status: int) -> NoReturn:
        if os.getpid() == pid:  # not in a child that was forked
            _say(alive, EXITED + bytes([status & 0xFF]))
        leave(status)

    return _exit


def _say(alive: int | None, word: bytes) -> None:
    """Tell the supervisor how this rank ends."""
    if alive is not None:
        with contextlib.suppress(BrokenPipeError):  # it is gone
            os.write(alive, word)


def _run(argv: Sequence[str]) -> None:
    """Run a script in a fresh `__main__`, with the path and the arguments that Python would give it."""
    script = os.path.abspath(argv[0])
    module = types.ModuleType("__main__")
    vars(module).update(__file__=script, __builtins__=builtins, __cached__=None)
    sys.modules["__main__"] = module
    sys.argv = list(argv)
    if not sys.flags.safe_path:
        del sys.path[0]
    sys.path.insert(0, os.path.dirname(os.path.realpath(script)))
    # Not `runpy.run_path`: it gives a relative `__file__`, and drops `__main__` before threads and
    # exit handlers of the script are done with it.
    with io.open_code(script) as source:
        code = compile(source.read(), script, "exec", dont_inherit=True)
    exec(code, vars(module))  # noqa: S102 - the user's own script


def _exit_code(error: BaseException) -> int:
    """Return the exit code that Python would give a script which ends with `error`."""
    if not isinstance(error, SystemExit):
        return 1
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code and (error.code & 0xFF or 1)  # 256 would count as success
    return 1


def _report(error: BaseException, place: env.Place, exit_code: int, time_s: float) -> Report:
    """Return the report of `error`: its traceback starts in the script, its note says whose it is."""
    host = socket.gethostname()
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    if isinstance(error, Preempted):
        return Report(
            rank=place.rank, world_size=place.world_size, host=host, time_s=time_s, exit_code=exit_code,
            text=error.reason,
        )  # fmt: skip
    if isinstance(error, SystemExit):  # the script chose its end: where it did so is enough
        frames = traceback.extract_tb(trace)
        for frame in [each for each in frames if each.filename == frames[0].filename][-1:]:
            error.add_note(f"at {frame.filename}:{frame.lineno}")
        trace = None
    only = traceback.format_exception_only(error)  # of a SyntaxError also where it is, set off
    error.add_note(f"rank {place.rank} of {place.world_size}, host {host}")
    return Report(
        rank=place.rank,
        world_size=place.world_size,
        host=host,
        time_s=time_s,
        exit_code=exit_code,
        text="".join(traceback.format_exception(type(error), error, trace)),
        error=next(line for line in only if not line.startswith(" ")).partition("\n")[0][:_LINE_LENGTH],
    )


def _leave(report: Report, folder: str | None) -> bool:
    """Leave `report` for the supervisor; return False where it cannot find that: on another host, or there is none."""
    with contextlib.suppress(OSError):
        if folder:
            report.write(Path(folder))
            return True
    return False


def _end_job(exit_code: int, *, is_told: bool) -> NoReturn:
    """End this process at once; where the supervisor is not told, which ends the others, have MPI do that."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads: the end is the same
            stream.flush()
    mpi = sys.modules.get("mpi4py.MPI")
    if not is_told and mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.COMM_WORLD.Abort(exit_code)
    os._exit(exit_code)


if __name__ == "__main__":
    main(sys.argv[1:])
