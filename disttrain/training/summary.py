"""`Model.summary`: the layers of a model as a table."""

from rich.console import Console
from rich.table import Table

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
