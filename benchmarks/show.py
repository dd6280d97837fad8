"""Figures as a table with what is missing from it, and as a plot."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from benchmarks import systems, workloads
from benchmarks.figures import Row
from benchmarks.tasks import Task

_RATIOS = {
    "ratio_to_best_peer": "the best peer's median over the system's; above 1 is better",
    "ratio_to_one_worker": "samples per second over those of one worker",
}


def table(task: Task, rows: Sequence[Row]) -> Table:
    """Return the rows as a table, a section for each workload."""
    shown = Table(title=task.title, title_justify="left")
    for heading in ("", "system", "variant"):
        shown.add_column(heading, no_wrap=heading == "system")
    for heading in (f"median {task.unit}", "spread", *task.columns.values(), "ratio"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for number, row in enumerate(rows):
        is_last = number + 1 == len(rows) or rows[number + 1]["workload"] != row["workload"]
        is_first = number == 0 or rows[number - 1]["workload"] != row["workload"]
        shown.add_row(
            row["workload"] if is_first else "",
            Text(row["system"], style="bold" if systems.is_ours(row["system"]) else ""),
            *_cells(task, row),
            end_section=is_last,
        )
    versions = {name: version for row in rows for name, version in (row["versions"] or {}).items()}
    shown.caption = "\n".join(
        [
            *(f"{name}: {workloads.get(name).title}" for name in dict.fromkeys(row["workload"] for row in rows)),
            f"ratio: {_RATIOS[task.ratio]}",
            "spread: from the first to the third quartile",
            ", ".join(f"{name} {version}" for name, version in versions.items()),
        ]
    )
    shown.caption_justify = "left"
    return shown


def gaps(rows: Sequence[Row]) -> list[Text]:
    """Return why figures are missing, a text for each gap; failures are red."""
    return [
        Text(f"gap: {row['workload']} {row['system']}: {row['gap']}", style="red" if row["is_failure"] else "")
        for row in rows
        if row["gap"]
    ]


def plot(task: Task, rows: Sequence[Row], path: Path) -> None:
    """Write the ratios as bars to `path`, in the format that its ending names."""
    import matplotlib as mpl

    mpl.use("Agg")  # no window
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["workload"] for row in rows))
    kinds = list(dict.fromkeys(row["system"] for row in rows if row[task.ratio]))
    width = 0.8 / max(len(kinds), 1)
    figure, axes = pyplot.subplots(figsize=(3.5 + 1.6 * len(names), 4), layout="constrained")
    for place, kind in enumerate(kinds):
        known = [row for row in rows if row["system"] == kind and row[task.ratio]]
        left = [names.index(row["workload"]) + (place - (len(kinds) - 1) / 2) * width for row in known]
        bars = axes.bar(left, [row[task.ratio] for row in known], width, label=kind)
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel(f"ratio: {_RATIOS[task.ratio]}", fontsize=8)
    axes.set_title(task.title)
    figure.legend(loc="outside right upper", fontsize=8)  # beside the bars
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _cells(task: Task, row: Row) -> list[Text | str]:
    """Return the cells of a row after the system's name."""
    if row["gap"]:
        return [Text("failed" if row["is_failure"] else "absent", style="dim"), *("-" * (3 + len(task.columns)))]
    ratio = f"{row[task.ratio]:.2f}" if row[task.ratio] else "-"
    is_best = row["best_peer"] == row["system"]
    numbers = (row["median"], row["spread"], *(row[key] for key in task.columns))
    return [row["variant"], *map(_number, numbers), f"best {ratio}" if is_best else ratio]


def _number(value: float | int | None) -> str:
    if value is None or isinstance(value, int):
        return "-" if value is None else f"{value}"
    return f"{value:.3f}" if value < 10 else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"
