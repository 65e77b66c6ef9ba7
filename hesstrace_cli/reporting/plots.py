"""Plots of trace records, drawn to a file without a display."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hesstrace_cli.errors import ConfigError
from hesstrace_cli.files import write_atomically
from hesstrace_cli.records import read_epochs
from hesstrace_cli.reporting.layout import shortened
from hesstrace_cli.reporting.text import for_plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_INSIDE = 5  # names of a legend inside the axes
_BAR, _BAR_HEIGHT, _MOST_BARS = "#4477aa", 0.22, 60
_LONGEST_NAME = 40
Record = Mapping[str, Any]

_PLAIN = "#7f7f7f"
_COLOURS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9")  # C7 is grey
_MARKERS = "os^Dv<>PX*"
_LINES: tuple[Any, ...] = (
    "-", "--", ":", "-.", (0, (8, 2)), (0, (1, 3)), (0, (5, 1, 1, 1, 1, 1)), (0, (3, 4)),
    (0, (10, 3, 2, 3)), (0, (2, 1)),
)  # fmt: skip
_HATCHES = ("", "///", "...", "xxx", "\\\\\\", "+++", "ooo", "---", "|||", "***")


@dataclass(frozen=True)
class Look:
    """How one of several rows is drawn; no two of up to 90 look the same.

    Attributes:
        colour: Grey for the plain network alone.
        marker: Of points.
        line: Of lines.
        hatch: Of bars.
    """

    colour: str
    marker: str
    line: Any
    hatch: str


def looks(names: Sequence[str]) -> dict[str, Look]:
    """A look for each name."""
    found = {}
    for grey in (True, False):
        colours = (_PLAIN,) if grey else _COLOURS
        for number, name in enumerate(n for n in names if _is_plain(n) == grey):
            style = number // len(colours) % len(_MARKERS)
            found[name] = Look(colours[number % len(colours)], _MARKERS[style], _LINES[style],
                               _HATCHES[style])  # fmt: skip
    return found


def _is_plain(name: str) -> bool:
    """Whether it names a row without regularizer, or by the usual names such a run or its file."""
    return re.search(r"(^|[ /-])none(-seed\d+)?(/[^/]*)?$", name) is not None


def plain_first(names: Iterable[str]) -> list[str]:
    """The names in their order, but those of plain networks before the others."""
    return sorted(names, key=lambda name: not _is_plain(name))


def drawn(name: str) -> str:
    """A name as it is drawn: safe, and cut in the middle where it is long."""
    if len(name) > _LONGEST_NAME:
        end = 2 * _LONGEST_NAME // 3
        name = f"{name[: _LONGEST_NAME - end]}...{name[-end:]}"
    return for_plot(name)


def drawn_names(names: Sequence[str]) -> list[str]:
    """Names beside each other: without what all have in common."""
    return list(map(drawn, shortened(names)))


FORMATS = (".png", ".pdf", ".svg")


def check_format(file: str | None) -> None:
    """Find out before the work whether a plot can be drawn to this file.

    Raises:
        ConfigError: If its name does not end with a known format.
    """
    if file is not None and Path(file).suffix.lower() not in FORMATS:
        raise ConfigError(f"--plot is {file!r}, expected a name ending with {', '.join(FORMATS)}")


def save(figure: Figure, file: str) -> None:
    """Write a figure in the format that the file's name ends with, whole or not at all.

    Raises:
        ConfigError: If the figure cannot be drawn or the file cannot be written.
    """
    drawn = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # a box stands for what the font lacks
            kind = Path(file).suffix[1:].lower()
            figure.savefig(drawn, format=kind, dpi=150, bbox_inches="tight")
    except (ValueError, RuntimeError) as problem:
        reason = " ".join(str(problem).split())
        raise ConfigError(f"--plot {file!r} cannot be drawn: {reason}") from problem
    write_atomically(Path(file), drawn.getvalue())


def plot_traces(records: Sequence[Record]) -> Figure:
    """One record: its layers. Several: the trace against the epoch, or a bar a checkpoint."""
    if len(records) == 1:
        return plot_layers(records[0])
    if all(record.get("epoch") is not None for record in records):
        return plot_epochs(records)
    return _bars(
        drawn_names([str(r["checkpoint"]) for r in records]),
        [r["trace"] for r in records],
        [r["stderr"] for r in records],
        f"{_matrix(records[0])} of {len(records)} checkpoints",
        _matrix(records[0]),
    )


def plot_layers(record: Record) -> Figure:
    """A bar for the trace of every parameter tensor, the largest where there are too many."""
    layers = list(record["per_layer"])
    title = f"{_matrix(record)} by parameter: {drawn(str(record['checkpoint']))}"
    if len(layers) > _MOST_BARS:
        largest = sorted(layers, key=lambda layer: -abs(layer["trace"]))[:_MOST_BARS]
        title += f" (the {_MOST_BARS} largest of {len(layers)})"
        layers = [layer for layer in layers if layer in largest]
    return _bars(
        [f"{drawn(layer['name'])} ({layer['num_parameters']})" for layer in layers],
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
    order = plain_first(runs)
    by_folder = looks(order)
    for folder, name in zip(order, drawn_names(order), strict=True):
        own, look = sorted(runs[folder], key=lambda r: r["epoch"]), by_folder[folder]
        axes.errorbar(
            [r["epoch"] for r in own], [r["trace"] for r in own],
            yerr=[1.96 * (r["stderr"] or 0) for r in own], color=look.colour, linestyle=look.line,
            marker=look.marker, markersize=4, capsize=2, linewidth=1.2, label=name,
        )  # fmt: skip
    of_epochs(axes)
    axes.set(xlabel="epoch", ylabel=_matrix(records[0]))
    if all(r["trace"] > 0 for r in records):
        axes.set_yscale("log")
    finish(axes)
    return figure


def of_epochs(axes: Axes) -> None:
    """Whole numbers along the axis of epochs."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def plot_accuracy(summaries: Sequence[Record]) -> Figure:
    """Test accuracy against the trace, a point a run, a colour a regularizer."""
    summaries = [s for s in summaries if s["trace"]["trace"] is not None]
    figure, axes = _figure(6.4, 4.4)
    for name, look, own in _rows(summaries):
        traces, accuracies = zip(
            *((s["trace"]["trace"], s["test_accuracy"]) for s in own), strict=True
        )
        axes.scatter(
            traces, accuracies, s=26, alpha=0.8, label=name, color=look.colour, marker=look.marker
        )
    if all(s["trace"]["trace"] > 0 for s in summaries):
        axes.set_xscale("log")
    axes.set(xlabel="tr(H), training data, eval mode", ylabel="test accuracy")
    finish(axes)
    return figure


def plot_layers_by_row(summaries: Sequence[Record]) -> Figure | None:
    """The mean trace of every parameter tensor, a bar a regularizer; None for mixed models."""
    rows = _rows(summaries)
    layers = [[layer["name"] for layer in s["trace"]["per_layer"]] for s in summaries]
    if not layers or any(names != layers[0] for names in layers) or len(layers[0]) > _MOST_BARS:
        return None
    names = layers[0]
    figure, axes = _figure(7.0, 1.0 + _BAR_HEIGHT * len(names) * max(1.0, 0.35 * len(rows)))
    height = 0.8 / len(rows)
    for number, (row, look, own) in enumerate(rows):
        means = [
            sum(s["trace"]["per_layer"][i]["trace"] for s in own) / len(own)
            for i in range(len(names))
        ]
        axes.barh(
            [i + number * height for i in range(len(names))],
            means,
            height,
            label=row,
            color=look.colour,
            hatch=look.hatch,
        )
    places = [i + 0.4 - height / 2 for i in range(len(names))]
    axes.set_yticks(places, list(map(drawn, names)), fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("tr(H) of the block, mean over seeds")
    finish(axes)
    return figure


def plot_curves(summaries: Sequence[Record]) -> Figure:
    """Training loss and validation accuracy by epoch: means, with the range over the seeds."""
    figure, left = _figure(10.0, 3.8, (1, 2, 1))
    right = figure.add_subplot(1, 2, 2)
    for name, look, own in _rows(summaries):
        for axes, key in ((left, "train_loss"), (right, "val_accuracy")):
            curves = [c for c in (_curve(s["folder"], key) for s in own) if c]
            if not curves:
                continue
            epochs = range(1, 1 + min(map(len, curves)))
            columns = list(zip(*(c[: len(epochs)] for c in curves), strict=True))
            means = [sum(c) / len(c) for c in columns]
            axes.plot(epochs, means, label=name, lw=1.3, color=look.colour, linestyle=look.line)
            axes.fill_between(epochs, [min(c) for c in columns], [max(c) for c in columns],
                              color=look.colour, alpha=0.18, linewidth=0)  # fmt: skip
    left.set(xlabel="epoch", ylabel="training loss, penalties left out", yscale="log")
    right.set(xlabel="epoch", ylabel="validation accuracy")
    of_epochs(left)
    of_epochs(right)
    left.grid(visible=True, linewidth=0.4, alpha=0.5)
    finish(right)
    figure.tight_layout()
    return figure


def _rows(summaries: Sequence[Record]) -> list[tuple[str, Look, list[Record]]]:
    """Name, look and runs of each row, the plain network first."""
    several = len({(s["dataset"], s["model"]) for s in summaries}) > 1
    rows: dict[str, list[Record]] = {}
    for s in summaries:
        name = f"{s['dataset']} {s['model']} {s['regularizers']}" if several else s["regularizers"]
        rows.setdefault(name, []).append(s)
    order = plain_first(rows)
    by_name = looks(order)
    return [(name, by_name[row], rows[row])
            for row, name in zip(order, drawn_names(order), strict=True)]  # fmt: skip


def _curve(folder: str, key: str) -> list[float]:
    values = [epoch.get(key) for epoch in read_epochs(Path(folder) / "metrics.jsonl")]
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
