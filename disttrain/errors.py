"""The exception tree: every error that disttrain raises on purpose.

A message says what happened, what was expected and how to mend it. Code that does not know its rank
does not ask for it: the worker adds rank, host and step once, as a note.
"""

import difflib
from collections.abc import Iterable, Sequence


class DisttrainError(Exception):
    """Base of all errors raised by disttrain."""


class ConfigError(DisttrainError, ValueError):
    """An argument is not one that was expected: an unknown optimizer, a negative size."""


class ShapeError(DisttrainError, ValueError):
    """An array has another shape or dtype than its place asks for."""


class AutodiffError(DisttrainError, RuntimeError):
    """A gradient cannot be computed: a graph that was freed, an output that is not a scalar."""


class GradientMismatchError(AutodiffError, AssertionError):
    """A gradient differs from finite differences."""


class DataError(DisttrainError, ValueError):
    """The data cannot be trained on: labels outside the classes, lengths that differ."""


class DatasetMissingError(DisttrainError, FileNotFoundError):
    """A known data set is not on this machine; the message names the command that brings it."""


class NonFiniteError(DisttrainError, ArithmeticError):
    """Loss or gradients became NaN or infinite; the message names step, ranks, and what was first."""


class CommError(DisttrainError, RuntimeError):
    """Communication among ranks failed, or they disagree."""


class ContractError(CommError):
    """Ranks make different collectives; all raise the same message, which names two of them with file and line."""


class DeadRankError(CommError):
    """Ranks have died where the transport can lose them: the others may go on, by `Communicator.shrink`."""


class DriftError(CommError):
    """Replicas of a model are no longer equal; the message names step, tensor and ranks."""


class LaunchError(DisttrainError, RuntimeError):
    """A job cannot be started, or this process is not where its launcher believes it to be."""


class CheckpointError(DisttrainError, RuntimeError):
    """A checkpoint cannot be written or read."""


class LedgerError(CheckpointError):
    """A ledger does not say that each sample was read once an epoch, or was changed."""


class CheckpointDamagedError(CheckpointError):
    """A checkpoint's files are not what its manifest says they are."""


PREEMPTED = 75  # the exit code of a job that is to be started again: EX_TEMPFAIL of sysexits.h


class Preempted(SystemExit):
    """Training was asked to end before it was done, and its state is saved; a program ends with the code 75."""

    def __init__(self, reason: str) -> None:
        super().__init__(PREEMPTED)
        self.reason = reason


def readable(shape: Sequence[int | None]) -> str:
    """Return a shape for a message; a first length that is unknown or 0 stands for any number of samples."""
    lengths = [str(n) for n in shape]
    if shape and not shape[0]:
        lengths[0] = "samples"
    return f"({', '.join(lengths)})" if len(lengths) != 1 else f"({lengths[0]},)"


def unknown_name(kind: str, name: object, known: Iterable[str]) -> ConfigError:
    """Return the error for a `name` that is none of `known`, with the nearest right one.

    Args:
        kind: what was asked for, as in ``"optimizer"``.
        name: what was given.
        known: the names that would have been right.
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(name).lower(), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ConfigError(f"unknown {kind} {name!r}{hint} Known: {', '.join(names)}.")
