"""Plots of trace records, drawn to a file without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hesstrace_cli.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BAR, _BAR_HEIGHT, _MOST_BARS = "#4477aa", 0.22, 60
Record = Mapping[str, Any]


def save(figure: Figure, file: str) -> None:
    """Write a figure in the format that the file's name ends with.

    Raises:
        ConfigError: If the format is not known or the file cannot be written.
    """
    try:
        figure.savefig(file, dpi=150, bbox_inches="tight")
    except (OSError, ValueError) as problem:
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


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # here, as it takes half a second

    figure = Figure(figsize=(width, height))
    return figure, figure.add_subplot()
