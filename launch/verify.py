"""`disttrain verify`: whether a script computes the same bits on any number of workers, and if not, where they part."""

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from disttrain import env
from disttrain.errors import DisttrainError, LaunchError
from launch.job import Job
from launch.supervise import supervise

Notes = dict[str, Any]

_WORDS = {
    "initial weights": "the initial value of {0!r}",
    "samples": "the samples {0!r} of the batch",
    "output": "the output of layer {0!r}",
    "gradient": "the gradient of {0!r}",
    "weights": "{0!r} after the step",
}


@click.command(
    context_settings={"allow_interspersed_args": False},
    epilog="""\b
Examples:
  disttrain verify train.py
  disttrain verify -n 1,2,3 --steps 10 --launcher local train.py --epochs 3
""",
)
@click.option("-n", "--workers", default="1,2,4", show_default=True, metavar="A,B,..", help="Numbers of workers.")
@click.option("--steps", type=click.IntRange(min=1), default=3, show_default=True, help="To take, on each number.")
@click.option("--launcher", default="", metavar="NAME", help="As of `disttrain run`.")
@click.option("--transport", default="", metavar="NAME", help="As of `disttrain run`.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the findings there.")
@click.argument("script", type=click.Path(exists=True, dir_okay=False))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def verify(
    workers: str,
    steps: int,
    launcher: str,
    transport: str,
    json_file: Path | None,
    script: str,
    arguments: tuple[str, ...],
) -> None:
    """Take the first steps of SCRIPT on several numbers of workers, and compare all that they compute, to the bit.

    The script is run as it stands, and ended after some steps of its first `fit` or `train_on_batch`; it neither reads
    nor writes checkpoints meanwhile. The exit code is 0 only if samples, outputs of layers, gradients and weights have
    the same bits on all numbers of workers; else the first that has not is named, with what may be the reason.
    """
    sizes = _numbers(workers)
    jobs = [
        Job(workers=size, script=script, arguments=arguments, launcher=_launcher(size, launcher), transport=transport)
        for size in sizes
    ]
    try:
        notes = [_run(job, steps) for job in jobs]
        found = [(each, difference(notes[0], each)) for each in notes[1:]]
        again = None
        if any(place for _, place in found):
            again = difference(notes[0], _run(jobs[0], steps))
    except DisttrainError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
    lines = [_last(each) for each in notes]
    lines += [verdict(notes[0], each, place) for each, place in found if place]
    if again:
        lines.append(
            f"two runs on {_workers(sizes[0])} differ as well, first in {_words(again)}: something random has no seed; "
            "use dt.utils.set_random_seed, and numpy.random.default_rng(seed)"
        )
    agree = not any(place for _, place in found)
    lines.append(f"{len(sizes)} numbers of workers agree" if agree else "they do not agree")
    click.echo("\n".join(lines))
    if json_file is not None:
        places = {str(each["workers"]): place for each, place in found}
        json_file.write_text(json.dumps({"agree": agree, "first_difference": places, "runs": notes}, indent=1) + "\n")
    sys.exit(0 if agree else 1)


def difference(one: Notes, other: Notes) -> list[Any] | None:
    """Return the first note of `one`, in the order of causes, to which `other` has another digest; None if none has."""
    theirs = {tuple(note[:3]): note for note in other["notes"]}
    for note in one["notes"]:
        its = theirs.get(tuple(note[:3]))
        if its is not None and its[3] != note[3]:
            return [*note, its[4]]
    if one["steps"] != other["steps"]:
        return [min(one["steps"], other["steps"]), "steps", "", "", None, None]
    return None


def verdict(one: Notes, other: Notes, place: list[Any]) -> str:
    """Return in words where two runs part, and what may be the reason."""
    text = f"{_workers(one['workers'])} and {_workers(other['workers'])}: first in {_words(place)}"
    _, kind, name, _, norm, its = place
    if norm is not None and its is not None:
        text += f" (norm {norm:.9g} and {its:.9g})"
    return f"{text}; {_reason(one, kind, name)}"


def _reason(one: Notes, kind: str, name: str) -> str:
    if kind == "initial weights":
        return "an initial value must depend on the seed alone, not on the rank, the time, or unseeded random numbers"
    if kind == "samples":
        return "every rank must give fit() the same arrays, whatever number of workers there is"
    if kind == "steps":
        return "the script ended before, on one of them"
    if kind == "output" and name in one["unsynchronized"] and one["shards"] is None:
        return "synchronized=False normalizes by each worker's own samples"
    if one["shards"] is None:
        return "sums over workers have another order on each number of them: use fit(reproducible=True)"
    if kind == "output":
        return f"what {name!r} computes depends on the rank, or on random numbers without a key"
    return "a layer or loss of the script's own sums over workers, or depends on the rank"


def _run(job: Job, steps: int) -> Notes:
    """Return what the first steps of a job noted.

    Raises:
        LaunchError: the job failed, or took no step.
    """
    with tempfile.TemporaryDirectory(prefix="disttrain-verify-") as folder:
        os.environ[env.VERIFY] = f"{steps}:{folder}"
        try:
            code = supervise(job)
        finally:
            del os.environ[env.VERIFY]
        path = Path(folder) / f"{job.workers}.json"
        if code or not path.exists():
            what = f"failed with exit code {code}" if code else "took no step by fit() or train_on_batch()"
            raise LaunchError(f"{job.script} on {_workers(job.workers)} {what}: there is nothing to compare")
        notes: Notes = json.loads(path.read_text())
        return notes


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts) or len(set(parts)) < 2:
        raise click.BadParameter(f"{text!r}: expected several numbers of workers, as 1,2,4", param_hint="-n")
    return [int(part) for part in parts]


def _launcher(workers: int, launcher: str) -> str:
    return launcher if workers > 1 else ""


def _last(notes: Notes) -> str:
    """Return a line on a run: the digest of its last weights."""
    step = notes["steps"] - 1
    weights = [note[3] for note in notes["notes"] if note[0] == step and note[1] == "weights"]
    how = f"{notes['shards']} shards" if notes["shards"] else "not reproducible"
    return (
        f"{_workers(notes['workers'])} ({notes['transport']}, {how}, {notes['kernels']}): "
        f"weights {_joined(weights)} after {notes['steps']} steps"
    )


def _joined(digests: list[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


def _words(place: list[Any]) -> str:
    step, kind, name = place[:3]
    return f"{_WORDS.get(kind, 'the number of steps').format(name)}, step {step}"


def _workers(number: int) -> str:
    return "1 worker" if number == 1 else f"{number} workers"
