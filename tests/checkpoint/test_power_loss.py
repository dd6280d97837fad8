"""After a loss of power at any moment each checkpoint is whole or not there, and none that was reported is lost.

To leave out any one flush makes that false: so each is needed, and the model of the disk would notice.
"""

import functools
import os
import re
import tempfile
from pathlib import Path

import pytest

from disttrain import checkpoint
from disttrain.errors import CheckpointError
from tests.checkpoint import power, shelf
from tests.checkpoint.faults import Faults

SCENARIOS = {"by one rank": shelf.save, "by two ranks": shelf.save_by_two}
SAVES = 3  # of which the newest stays: so that all of it depends on the order of what is done


def recorded(save):
    """Return the operations of some saves, in a directory that the first of them makes, and marks of reports."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        faults = Faults(patch)
        for number in range(1, SAVES + 1):
            save(Path(folder) / "run", number, keep=1)
            faults.done.append(("reported", number))
        return [(kind, *(_short(each, folder) for each in rest)) for kind, *rest in faults.done]


def _short(value, folder):
    return value.replace(folder, "") if isinstance(value, str) else value


RECORDED = {scenario: recorded(save) for scenario, save in SCENARIOS.items()}


def faulty_states(operations, first=0):
    """Return how many states there are after the operation `first` and later ones, and what is wrong with which."""
    states, seen, wrong, disk, reported = set(), set(), [], power.Disk(), 0
    for number, (kind, *rest) in enumerate(operations):
        if kind == "reported":
            reported = rest[0]
        else:
            disk.do(kind, *rest)
        for state in disk.states(seed=number) if number >= first else ():
            states.add(frozenset(state.items()))
            # nobody reads what lies under a temporary name
            visible = frozenset((path, content) for path, content in state.items() if "/.tmp-" not in path)
            if (visible, reported) not in seen:
                seen.add((visible, reported))
                problem = look(visible, reported)
                wrong += [(number, operations[number][:2], problem)] if problem else []
    return len(states), wrong


@functools.cache
def look(state, reported):
    """Return what is wrong with a state; empty: nothing."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        power.put(dict(state), folder)
        run = Path(folder) / "run"
        names = sorted(name for name in os.listdir(run) if name.startswith("checkpoint-")) if run.exists() else []
        for name in names:
            try:
                shelf.number_in(run / name)
            except (CheckpointError, AssertionError) as error:
                return f"{name} is not whole: {error}"
        newest = checkpoint.load(run).values["number"] if names else 0
        return f"{newest} is the newest, and {reported} was reported" if newest < reported else ""


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_state_is_whole_and_nothing_reported_is_lost(scenario):
    count, wrong = faulty_states(RECORDED[scenario])
    assert wrong == []
    assert count > 400


def flushes():
    for scenario, operations in RECORDED.items():
        for number, (kind, *rest) in enumerate(operations):
            # a note tells another rank what was written, and is removed before the commit
            if kind == "sync" and "/part-" not in rest[0]:
                name = re.sub(r"^\.tmp-.*", "draft", Path(rest[0]).name)  # another one in each process that collects
                yield pytest.param(scenario, number, id=f"{scenario}-{number}-{name or 'parent'}")


@pytest.mark.parametrize(("scenario", "number"), list(flushes()))
def test_each_flush_is_needed(scenario, number):
    operations = RECORDED[scenario]
    _, wrong = faulty_states(operations[:number] + operations[number + 1 :], first=number)
    assert wrong
