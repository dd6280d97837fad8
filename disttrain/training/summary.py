"""`Model.summary`: the layers of a model as a table."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from disttrain.autodiff.plan import Plan
from disttrain.errors import readable
from disttrain.layers import Layer


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
        console.print("There is no plan: fewer than two steps of one shape were taken, or they differed.")
    for (x, y, _), plan in plans.items():
        table = Table(title=f"Plan for x {x[1]} {x[0]}, y {y[1]} {y[0]}", title_justify="left")
        for heading in ("call", "arguments", "output", "bytes", "where"):
            table.add_column(heading)
        for name, arguments, output, size, where in plan.rows():
            table.add_row(name, arguments, output, f"{size:,}", where)
        console.print(table)
        console.print(f"Arena: {plan.arena_bytes:,} bytes, for arrays of {plan.computed_bytes:,} bytes.")
