"""Plots of trace records, drawn to a file without a display."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hesstrace_cli.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS, _MOST_INSIDE = 10, 5
_MARKERS, _LINES, _HATCHES = "o^s", ("-", "--", ":"), ("", "///", "...")
_BAR, _BAR_HEIGHT, _MOST_BARS = "#4477aa", 0.22, 60
Record = Mapping[str, Any]


FORMATS = (".png", ".pdf", ".svg")


def check_format(file: str | None) -> None:
    """Find out before the work whether a plot can be drawn to this file.

    Raises:
        ConfigError: If its name does not end with a known format.
    """
    if file is not None and Path(file).suffix.lower() not in FORMATS:
        raise ConfigError(f"--plot is {file!r}, expected a name ending with {', '.join(FORMATS)}")


def save(figure: Figure, file: str) -> None:
    """Write a figure in the format that the file's name ends with.

    Raises:
        ConfigError: If the format is not known or the file cannot be written.
    """
    try:
        figure.savefig(file, dpi=150, bbox_inches="tight")
    except (OSError, ValueError, RuntimeError) as problem:
        reason = " ".join(str(problem).split())
        raise ConfigError(f"--plot {file!r} cannot be written: {reason}") from problem


def plot_traces(records: Sequence[Record]) -> Figure:
    """One record: its layers. Several: the trace against the epoch, or a bar a checkpoint."""
    if len(records) == 1:
        return plot_layers(records[0])
    if all(record.get("epoch") is not None for record in records):
        return plot_epochs(records)
    return _bars(
        [str(r["checkpoint"]) for r in records],
        [r["trace"] for r in records],
        [r["stderr"] for r in records],
        f"{_matrix(records[0])} of {len(records)} checkpoints",
        _matrix(records[0]),
    )


def plot_layers(record: Record) -> Figure:
    """A bar for the trace of every parameter tensor, the largest where there are too many."""
    layers = list(record["per_layer"])
    title = f"{_matrix(record)} by parameter: {record['checkpoint']}"
    if len(layers) > _MOST_BARS:
        largest = sorted(layers, key=lambda layer: -abs(layer["trace"]))[:_MOST_BARS]
        title += f" (the {_MOST_BARS} largest of {len(layers)})"
        layers = [layer for layer in layers if layer in largest]
    return _bars(
        [f"{layer['name']} ({layer['num_parameters']})" for layer in layers],
        [layer["trace"] for layer in layers],
        [layer["stderr"] for layer in layers],
        title,
        f"{_matrix(record)} of the block",
    )


def plot_epochs(records: Sequence[Record]) -> Figure:
    """The trace against the epoch, a line for the checkpoints of each folder."""
    figure, axes = _figure(6.4, 4.0)
    runs: dict[str, list[Record]] = {}
    for record in records:
        runs.setdefault(str(Path(record["checkpoint"]).parent), []).append(record)
    for folder, own in runs.items():
        own = sorted(own, key=lambda r: r["epoch"])
        axes.errorbar(
            [r["epoch"] for r in own], [r["trace"] for r in own],
            yerr=[1.96 * (r["stderr"] or 0) for r in own],
            marker="o", markersize=4, capsize=2, linewidth=1.2, label=folder,
        )  # fmt: skip
    axes.set(xlabel="epoch", ylabel=_matrix(records[0]))
    if all(r["trace"] > 0 for r in records):
        axes.set_yscale("log")
    axes.legend(fontsize=8)
    axes.grid(visible=True, linewidth=0.4, alpha=0.5)
    return figure


def plot_accuracy(summaries: Sequence[Record]) -> Figure:
    """Test accuracy against the trace, a point a run, a colour a regularizer."""
    summaries = [s for s in summaries if s["trace"]["trace"] is not None]
    figure, axes = _figure(6.4, 4.4)
    for number, (name, own) in enumerate(_by_row(summaries).items()):
        axes.scatter([s["trace"]["trace"] for s in own], [s["test_accuracy"] for s in own],
                     s=26, alpha=0.8, label=name, color=f"C{number % _COLOURS}",
                     marker=_MARKERS[number // _COLOURS % len(_MARKERS)])  # fmt: skip
    if all(s["trace"]["trace"] > 0 for s in summaries):
        axes.set_xscale("log")
    axes.set(xlabel="tr(H), training data, eval mode", ylabel="test accuracy")
    finish(axes)
    return figure


def plot_layers_by_row(summaries: Sequence[Record]) -> Figure | None:
    """The mean trace of every parameter tensor, a bar a regularizer; None for mixed models."""
    rows = _by_row(summaries)
    layers = [[layer["name"] for layer in s["trace"]["per_layer"]] for s in summaries]
    if not layers or any(names != layers[0] for names in layers) or len(layers[0]) > _MOST_BARS:
        return None
    names = layers[0]
    figure, axes = _figure(7.0, 1.0 + _BAR_HEIGHT * len(names) * max(1.0, 0.35 * len(rows)))
    height = 0.8 / len(rows)
    for number, (row, own) in enumerate(rows.items()):
        means = [
            sum(s["trace"]["per_layer"][i]["trace"] for s in own) / len(own)
            for i in range(len(names))
        ]
        axes.barh(
            [i + number * height for i in range(len(names))],
            means,
            height,
            label=row,
            color=f"C{number % _COLOURS}",
            hatch=_HATCHES[number // _COLOURS % 3],
        )
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(names))], names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("tr(H) of the block, mean over seeds")
    finish(axes)
    return figure


def plot_curves(summaries: Sequence[Record]) -> Figure:
    """Training loss and validation accuracy by epoch: means, with the range over the seeds."""
    figure, left = _figure(10.0, 3.8, (1, 2, 1))
    right = figure.add_subplot(1, 2, 2)
    for number, (name, own) in enumerate(_by_row(summaries).items()):
        look: dict[str, Any] = {
            "color": f"C{number % _COLOURS}",
            "linestyle": _LINES[number // _COLOURS % 3],
        }
        for axes, key in ((left, "train_loss"), (right, "val_accuracy")):
            curves = [c for c in (_curve(s["folder"], key) for s in own) if c]
            if not curves:
                continue
            epochs = range(1, 1 + min(map(len, curves)))
            columns = list(zip(*(c[: len(epochs)] for c in curves), strict=True))
            (line,) = axes.plot(
                epochs, [sum(c) / len(c) for c in columns], label=name, lw=1.3, **look
            )
            axes.fill_between(epochs, [min(c) for c in columns], [max(c) for c in columns],
                              color=line.get_color(), alpha=0.18, linewidth=0)  # fmt: skip
    left.set(xlabel="epoch", ylabel="training loss, penalties left out", yscale="log")
    right.set(xlabel="epoch", ylabel="validation accuracy")
    left.grid(visible=True, linewidth=0.4, alpha=0.5)
    finish(right)
    figure.tight_layout()
    return figure


def _by_row(summaries: Sequence[Record]) -> dict[str, list[Record]]:
    several = len({(s["dataset"], s["model"]) for s in summaries}) > 1
    rows: dict[str, list[Record]] = {}
    for s in summaries:
        name = f"{s['dataset']} {s['model']} {s['regularizers']}" if several else s["regularizers"]
        rows.setdefault(name, []).append(s)
    return rows


def _curve(folder: str, key: str) -> list[float]:
    file = Path(folder) / "metrics.jsonl"
    if not file.is_file():
        return []
    values = [json.loads(line).get(key) for line in file.read_text().splitlines()]
    return [value for value in values if value is not None]


def finish(axes: Axes) -> None:
    """Add a grid, and a legend where there is something to name."""
    axes.grid(visible=True, linewidth=0.4, alpha=0.5)
    names = axes.get_legend_handles_labels()[1]
    if len(names) > _MOST_INSIDE:  # beside the axes, where it hides nothing
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)
    elif names:
        axes.legend(fontsize=8)


def _matrix(record: Record) -> str:
    return "tr(H)" if record["curvature"] == "hessian" else "tr(G)"


def _bars(
    names: Sequence[str],
    values: Sequence[float],
    errors: Sequence[float | None],
    title: str,
    label: str,
) -> Figure:
    figure, axes = _figure(7.0, 1.0 + _BAR_HEIGHT * len(names))
    axes.barh(
        range(len(names)), values, xerr=[1.96 * (e or 0) for e in errors], color=_BAR,
        error_kw={"linewidth": 0.8},
    )  # fmt: skip
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.set_title(title, fontsize=9, loc="left")
    axes.grid(visible=True, axis="x", linewidth=0.4, alpha=0.5)
    return figure


def _figure(
    width: float, height: float, place: tuple[int, int, int] = (1, 1, 1)
) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # here, as it takes half a second

    figure = Figure(figsize=(width, height))
    return figure, figure.add_subplot(*place)
