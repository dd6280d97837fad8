"""`disttrain ckpt`: what checkpoints hold, whether they are whole, and how they differ."""

import functools
import json
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file

from disttrain import checkpoint, env
from disttrain.checkpoint.inspection import Entry, differences, entries
from disttrain.checkpoint.inspection import repair as put_in_order
from disttrain.errors import DisttrainError
from launch.audit import audited

_WIDE = 1000  # columns


@click.group()
def ckpt() -> None:
    """Look at checkpoints, compare, verify, repair and export them.

    RUN is a directory of checkpoints or a single one, on a disk or behind an fsspec address.
    """


def _command(*examples: str) -> Callable[[Callable[..., Any]], click.Command]:
    """Return a decorator that makes a command of a function which returns its findings, and its exit code."""

    def command(function: Callable[..., tuple[Any, int]]) -> click.Command:
        @functools.wraps(function)
        def call(json_file: Path | None, **arguments: Any) -> None:
            try:
                found, code = function(**arguments)
                if json_file is not None:
                    json_file.write_text(json.dumps(found, indent=1) + "\n")
            except (DisttrainError, OSError) as error:
                click.echo(f"Error: {error}", err=True)
                sys.exit(2)
            sys.exit(code)

        option = click.option(
            "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the findings there."
        )
        # The backspace keeps click from joining the lines.
        return ckpt.command(epilog="\n".join(["\b", "Examples:", *(f"  {each}" for each in examples)]))(option(call))

    return command


_run = click.argument("run")


@_command("disttrain ckpt ls backup", "disttrain ckpt ls s3://bucket/run --json list.json")
@_run
def ls(run: str) -> tuple[Any, int]:
    """List the checkpoints in RUN by their manifests, the newest last."""
    found = entries(run, thoroughly=False)
    rows = [{**_summary(entry), "trouble": "" if entry.is_whole else _trouble(entry)} for entry in found]
    _show(
        ("checkpoint", "written", "MB", "epoch", "step", "metric", "state"),
        (
            (r["name"], r["written"], f"{r['bytes'] / 1e6:.1f}", r["epoch"], r["iterations"], r["metric"], r["state"])
            for r in rows
        ),
    )
    for row in rows:
        if row["trouble"]:
            click.echo(f"{row['name']}: {row['trouble']}")
    return rows, 0


@_command("disttrain ckpt show backup", "disttrain ckpt show backup/checkpoint-000007")
@_run
def show(run: str) -> tuple[Any, int]:
    """Show what the newest checkpoint in RUN holds: its files, its tensors, and what was saved beside them."""
    *_, entry = entries(run, thoroughly=False)
    if entry.manifest is None:
        raise DisttrainError(_trouble(entry))
    files: list[dict[str, Any]] = [
        {"file": f.name, "bytes": f.size, "sha256": f.sha256, "tensors": f.tensors} for f in entry.manifest.files
    ]
    _show(
        ("file", "tensor", "dtype", "shape", "piece of"),
        (
            (file["file"], name, each.get("dtype"), _shape(each.get("shape")), _shape(each.get("of")))
            for file in files
            for name, each in file["tensors"].items()
        ),
    )
    values = entry.manifest.values
    for name, value in _facts(values):
        click.echo(f"{name}: {value}")
    return {**_summary(entry), "files": files, "values": values}, 0


@_command("disttrain ckpt verify backup")
@_run
def verify(run: str) -> tuple[Any, int]:
    """Read all files in RUN and compare their hashes; name those that are damaged, and the checkpoint to be used.

    The exit code is 0 only if all checkpoints are whole.
    """
    found = entries(run, thoroughly=True)
    for entry in found:
        click.echo(f"{entry.name or run}: {'whole' if entry.is_whole else _trouble(entry)}")
    used = next((entry.name or run for entry in reversed(found) if entry.is_whole), None)
    click.echo(f"would be used: {used}" if used else "none can be used")
    rows = [{"name": e.name, "whole": e.is_whole, "damage": e.damage, "unknown": e.unknown} for e in found]
    return {"checkpoints": rows, "used": used}, 0 if all(entry.is_whole for entry in found) else 1


@_command("disttrain ckpt diff backup/checkpoint-000006 backup/checkpoint-000007", "disttrain ckpt diff run-1 run-2")
@click.argument("first")
@click.argument("second")
def diff(first: str, second: str) -> tuple[Any, int]:
    """Compare the tensors of two checkpoints, of a directory its newest whole one.

    The exit code is 0 if all bits are the same, 1 if not, and 2 if they could not be compared.
    """
    a, b = checkpoint.load(first), checkpoint.load(second)
    found = differences(a.tensors, b.tensors)
    if found:
        _show(
            ("tensor", "elements that differ", "largest difference", "relative"),
            ((each["tensor"], *_difference(each, (a.place, b.place))) for each in found),
        )
    count = len({(group, name) for each in (a, b) for group, arrays in each.tensors.items() for name in arrays})
    click.echo(f"{len(found)} of {count} tensors differ" if found else f"all {count} tensors have the same bits")
    return {"places": [a.place, b.place], "differences": found}, 1 if found else 0


@_command("disttrain ckpt audit backup", "DISTTRAIN_LEDGER_KEY_FILE=key disttrain ckpt audit backup")
@_run
def audit(run: str) -> tuple[Any, int]:
    """Check by the ledgers in RUN that each sample went into the weights exactly once an epoch.

    A ledger says what the ranks have read at each step, through all interruptions and numbers of workers. The exit code
    is 0 only if the ledger of each checkpoint is in order, 1 if one is not, and 2 if there is none to look at.
    """
    key = env.ledger_key()
    rows = [row for entry in entries(run, thoroughly=False) if (row := audited(entry, key)) is not None]
    if not rows:
        raise DisttrainError(f"{run}: no checkpoint here is of a training, with a ledger")
    for row in rows:
        click.echo(f"{row['name'] or run}: {row['words']}")
    if not key:
        click.echo(
            f"without a key ({env.LEDGER_KEY_FILE}) this shows mistakes, but not who makes a false ledger on purpose"
        )
    return rows, 0 if all(row["in_order"] for row in rows) else 1


@_command("disttrain ckpt repair backup")
@_run
def repair(run: str) -> tuple[Any, int]:
    """Remove what is half-written in RUN, and set aside what is damaged; nothing that is whole is touched.

    What is damaged stays, under a name that begins with "damaged-", for you to look at or to remove. Behind an
    address there are no locks: be sure that no run is writing there.
    """
    done: list[str] = []
    count = put_in_order(run, done.append)
    for line in done:
        click.echo(line)
    if not count:
        click.echo("nothing to repair")
    return done, 0


@_command("disttrain ckpt export backup weights.safetensors", "disttrain ckpt export backup weights.npz")
@_run
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
def export(run: str, file: Path) -> tuple[Any, int]:
    """Write the weights of the newest whole checkpoint in RUN to FILE, whose name ends with .safetensors or .npz."""
    if file.suffix not in (".safetensors", ".npz"):
        raise DisttrainError(f"{file}: expected a name that ends with .safetensors or .npz")
    found = checkpoint.load(run)
    weights = found.tensors.get("model")
    if not weights:
        raise DisttrainError(f"{found.place} holds no weights: its groups are {', '.join(found.tensors) or 'none'}")
    if file.suffix == ".npz":
        _save_npz(file, weights)
    else:
        save_file(weights, file)
    click.echo(f"{len(weights)} weights of {found.place} are in {file}")
    return {"place": found.place, "file": str(file), "weights": sorted(weights)}, 0


def _save_npz(file: Path, arrays: dict[str, Any]) -> None:
    """Write what `numpy.savez` does; an array may have any name, as ``file``."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _summary(entry: Entry) -> dict[str, Any]:
    manifest = entry.manifest
    values = manifest.values if manifest and isinstance(manifest.values, dict) else {}
    training = values.get("training")
    training = training if isinstance(training, dict) else {}
    about = manifest.about if manifest else {}
    metric = about.get("metric")
    return {
        "name": entry.name,
        "written": about.get("written"),
        "bytes": entry.size,
        "epoch": training.get("epoch"),
        "iterations": training.get("iterations", values.get("iterations")),
        "metric": f"{metric.get('name')} {_short(metric.get('value'))}" if isinstance(metric, dict) else None,
        "state": "" if entry.is_whole else "unreadable" if entry.unknown else "damaged",
    }


def _trouble(entry: Entry) -> str:
    return entry.unknown or f"damaged: {'; '.join(entry.damage.values())}"


def _facts(values: Any) -> Iterable[tuple[str, Any]]:
    """Yield what was saved beside the tensors, long parts left out: the file of --json has them."""
    named: dict[str, Any] = values if isinstance(values, dict) else {"values": values}
    for name, value in named.items():
        if name == "training" and isinstance(value, dict):
            yield from _facts(value)
        elif len(json.dumps(value)) <= 200:
            yield name, json.dumps(value)


def _difference(each: dict[str, Any], places: tuple[str, str]) -> tuple[str, ...]:
    if "only" in each:
        return f"only in {places[each['only'] - 1]}", "", ""
    if "kinds" in each:
        return " and ".join(each["kinds"]), "", ""
    numbers = ("not finite" if each[n] is None else f"{each[n]:.3g}" for n in ("largest", "relative"))
    return f"{each['elements']} of {each['of']}", *numbers


def _shape(shape: Any) -> str:
    return "" if shape is None else str(shape)


def _show(columns: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> None:
    table = Table(box=None, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*("" if value is None else _printable(str(value)) for value in row))
    width = None if sys.stdout.isatty() else _WIDE  # whoever reads a file wants whole lines
    Console(highlight=False, markup=False, width=width).print(table)


def _printable(text: str) -> str:
    """Return `text`, which a file said, without what a terminal would take for a command."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _short(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
