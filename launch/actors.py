"""What `--launcher ray` starts: `python -m launch.actors REQUEST script.py args...`, which has Ray run the script.

Ranks on the supervisor's host use its pipes, as under any launcher. What ranks on other hosts write comes by Ray, which
names the rank; how they failed comes back as the result of their actors, and is left for the supervisor here.
"""

import dataclasses
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from disttrain import env
from disttrain.errors import LaunchError
from disttrain.ray import RankLostError, Ranks, Request, cluster
from launch import worker
from launch.report import REFUSAL, Report


class ScriptError(Exception):
    """A rank's script has failed: its report, and whether the supervisor has that."""

    def __init__(self, report: Report, is_told: bool) -> None:
        super().__init__(report, is_told)
        self.report, self.is_told = report, is_told


def main(argv: Sequence[str]) -> int:
    """Have Ray run the script ``argv[1]`` as `argv[0]` asks; return the exit code of the job."""
    request = Request(**json.loads(argv[0]))
    folder = Path(os.environ[env.JOB_DIR])
    environment = {**env.own(), env.JOB_DIR: str(folder)}
    asked: list[int] = []  # signals that are to be passed on
    try:
        with (
            cluster(request, folder),
            Ranks(request, environment=environment, folder=os.getcwd(), script=argv[1]) as ranks,
        ):
            for number in (signal.SIGINT, signal.SIGTERM):  # Ray has set handlers of its own
                signal.signal(number, lambda number, _: asked.append(number))
            ranks.call(serve, list(argv[1:]))
            for outcome in ranks.outcomes():
                while asked:
                    ranks.signal(asked.pop(0))
                if outcome is not None and isinstance(outcome[1], BaseException):
                    return _tell(outcome[1], ranks.size, folder)
    except LaunchError as error:
        (folder / REFUSAL).write_text(str(error))
        return 2
    return 0


def serve(argv: Sequence[str]) -> None:
    """Run the script ``argv[0]`` in the actor that this is called in.

    Raises:
        ScriptError: it has failed.
    """
    failure = worker.serve(argv)
    if failure is not None:
        raise ScriptError(*failure)


def _tell(error: BaseException, workers: int, folder: Path) -> int:
    """Have the supervisor know why a rank has failed, if it does not; return the exit code of the job."""
    if isinstance(error, ScriptError):
        report, is_told = error.report, error.is_told
    elif isinstance(error, RankLostError):
        report = Report(
            rank=error.rank,
            world_size=workers,
            host=error.host,
            time_s=0.0,
            exit_code=error.exit_code,
            text=f"{error}\n",
            error=error.cause,
        )
        is_told = error.is_near
    else:
        raise error
    if not is_told:  # the clock of its host may be another; and others fail because of a loss, though they tell sooner
        time_s = 0.0 if isinstance(error, RankLostError) else time.monotonic()
        dataclasses.replace(report, time_s=time_s).write(folder)
    return report.exit_code


if __name__ == "__main__":
    # As this module is imported by the actors too: what has been pickled here is found there.
    sys.exit(importlib.import_module("launch.actors").main(sys.argv[1:]))
