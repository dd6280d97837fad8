"""What a model shows of itself: its layers as a table, its plans as tables and drawings."""

import os
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from disttrain.autodiff.plan import Plan
from disttrain.errors import ConfigError, readable
from disttrain.layers import Layer

_NO_PLAN = "There is no plan: fewer than two steps of one shape were taken, or they differed."


def summarize(model: Layer) -> None:
    """Print the layers of `model` with their output shapes and numbers of weights."""
    console = Console()
    table = Table(title=f"{type(model).__name__}", title_justify="left")
    for heading, justify in (("Layer (type)", "left"), ("Output shape", "left"), ("Parameters", "right")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for name, layer in model.sublayers():
        table.add_row(
            f"{name} ({type(layer).__name__})",
            readable(layer.output_shape) if layer.output_shape else "not built",
            f"{layer.count_params():,}",
        )
    console.print(table)
    trained = sum(w.size for w in model.trainable_weights)
    size = sum(w.data.nbytes for w in model.weights)
    console.print(f"Parameters: {model.count_params():,}, of which trained: {trained:,}. Size: {size / 2**20:.2f} MiB.")


def show_plans(plans: Mapping[Any, Plan]) -> None:
    """Print each of `plans`, by the shapes of the batch."""
    console = Console()
    if not plans:
        console.print(_NO_PLAN)
    for key, plan in plans.items():
        table = Table(title=_title(key), title_justify="left")
        for heading in ("call", "arguments", "output"):
            table.add_column(heading)
        for heading in ("bytes", "FLOP"):
            table.add_column(heading, justify="right")
        table.add_column("where")
        rows = list(plan.rows())
        for row in rows:
            table.add_row(row.name, row.arguments, row.output, f"{row.nbytes:,}", f"{row.flops:,}", row.where)
        console.print(table)
        console.print(
            f"{sum(row.flops for row in rows) / 1e9:.3f} GFLOP, {sum(row.nbytes for row in rows):,} bytes written. "
            f"Arena: {plan.arena_bytes:,} bytes, for arrays of {plan.computed_bytes:,} bytes."
        )


def draw_plans(plans: Mapping[Any, Plan], path: str | os.PathLike[str]) -> None:
    """Draw how each of `plans` uses its arena, call by call, to a file of a format that `path` ends with.

    Raises:
        ConfigError: there is no plan yet, or no matplotlib.
    """
    if not plans:
        raise ConfigError(_NO_PLAN)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("to draw a plan needs matplotlib: pip install disttrain[plot]") from error
    figure = Figure(figsize=(12, 5 * len(plans)), layout="constrained")
    for axes, (key, plan) in zip(figure.subplots(len(plans), squeeze=False)[:, 0], plans.items(), strict=True):
        names = [row.name for row in plan.rows()]
        for i, block in enumerate(plan.blocks):
            extent = (block.offset / 2**20, block.size / 2**20)
            axes.broken_barh([(block.first, block.last - block.first + 1)], extent, facecolor=f"C{i % 10}", alpha=0.8)
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=max(2, min(8, 600 / len(names))))
        axes.set(title=f"{_title(key)}: arena", ylabel="MiB", xlim=(0, len(names)), ylim=(0, plan.arena_bytes / 2**20))
    figure.savefig(path)


def _title(key: Any) -> str:
    (x, x_dtype), (y, y_dtype), *_ = key
    return f"Plan for x {x_dtype} {x}, y {y_dtype} {y}"
