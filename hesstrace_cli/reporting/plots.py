"""Plots of trace records, drawn to a file without a display."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hesstrace_cli.errors import ConfigError
from hesstrace_cli.reporting.apart import differing, key
from hesstrace_cli.reporting.layout import shortened
from hesstrace_cli.reporting.text import for_plot
from hesstrace_cli.storage.files import write_atomically
from hesstrace_cli.storage.records import read_epochs, selected, selection_metric, task_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_INSIDE = 5  # names of a legend inside the axes
_BAR, _BAR_HEIGHT, _MOST_BARS = "#4477aa", 0.22, 60
_LONGEST_NAME = 40
_LONGEST_PART = 60  # characters of a file's name
_PLAIN_KEYS = ("dataset", "model", "task")  # whose values say what they are of
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


def of_comparison(summaries: Sequence[Record]) -> list[tuple[str, Figure]]:
    """The plots of a comparison with their files' names, for each group that may be compared."""
    groups: dict[str, list[Record]] = {}
    for s in summaries:
        groups.setdefault(f"{key(s)} {task_name(s)}", []).append(s)
    found: list[tuple[str, Figure | None]] = []
    for part, own in zip(_parts(list(groups.values())), groups.values(), strict=True):
        metric = selection_metric(own[0]).replace("_", "-")
        found += [
            (f"{metric}-trace{part}.png", plot_metric(own)),
            (f"curves{part}.png", plot_curves(own)),
            (f"layers{part}.png", plot_layers_by_row(own)),
        ]
    return [(name, figure) for name, figure in found if figure is not None]


def _parts(groups: Sequence[Sequence[Record]]) -> list[str]:
    """A part of a file's name for each group: what sets it apart; nothing for one alone."""
    if len(groups) < 2:
        return [""] * len(groups)
    said = [
        {"dataset": own[0]["dataset"], "model": own[0]["model"], **own[0].get("settings", {}),
         "task": task_name(own[0])}
        for own in groups
    ]  # fmt: skip
    differ = differing(said)
    words = [
        "-".join(str(each.get(k)) if k in _PLAIN_KEYS else f"{k}-{each.get(k)}" for k in differ)
        for each in said
    ]
    names = [re.sub(r"[^\w.]+", "-", text).strip("-")[:_LONGEST_PART] for text in words]
    return [
        f"-{name}" if names.count(name) == 1 else f"-{name}-{number}"
        for number, name in enumerate(names, start=1)
    ]


def plot_metric(summaries: Sequence[Record]) -> Figure | None:
    """The test metric that the task picks by against the trace, a point a run; None without one.

    Args:
        summaries: Of runs of one task.
    """
    metric = selection_metric(summaries[0]) if summaries else "accuracy"
    figure, axes = _figure(6.4, 4.4)
    drawn_traces: list[float] = []
    for name, look, own in _rows(summaries):
        points = [(x, y) for s in own if (x := s["trace"]["trace"]) is not None
                  and (y := selected(s, "test", metric)) is not None]  # fmt: skip
        if points:
            traces, values = zip(*points, strict=True)
            axes.scatter(
                traces, values, s=26, alpha=0.8, label=name, color=look.colour, marker=look.marker
            )
            drawn_traces += traces
    if not drawn_traces:
        return None
    if min(drawn_traces) > 0:
        axes.set_xscale("log")
    axes.set(xlabel="tr(H), training data, eval mode", ylabel=f"test {_spelled(metric)}")
    finish(axes)
    return figure


def _spelled(metric: str) -> str:
    return metric.replace("_", " ")


def plot_layers_by_row(summaries: Sequence[Record]) -> Figure | None:
    """The mean trace of every parameter tensor, a bar a regularizer; None for mixed models."""
    summaries = [s for s in summaries if s["trace"]["per_layer"]]  # of the others it is not known
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


def plot_curves(summaries: Sequence[Record]) -> Figure | None:
    """By epoch the training loss, and the validation metric that the task picks by.

    Means, with the range over the seeds; a panel without any number is left out.

    Args:
        summaries: Of runs of one task.
    """
    metric = selection_metric(summaries[0]) if summaries else "accuracy"
    rows = [(name, look, [read_epochs(Path(s["folder"]) / "metrics.jsonl") for s in own])
            for name, look, own in _rows(summaries)]  # fmt: skip
    panels = {
        "training loss, penalties left out": _curves(rows, lambda epoch: epoch["train_loss"]),
        f"validation {_spelled(metric)}": _curves(rows, lambda e: selected(e, "val", metric)),
    }
    shown = {label: lines for label, lines in panels.items() if lines}
    if not shown:
        return None
    figure, first = _figure(5.0 * len(shown), 3.8, (1, len(shown), 1))
    for number, (label, lines) in enumerate(shown.items(), start=1):
        axes = first if number == 1 else figure.add_subplot(1, len(shown), number)
        for name, look, curves in lines:
            _draw_range(axes, name, look, curves)
        axes.set(xlabel="epoch", ylabel=label)
        if label.startswith("training") and _above_zero(lines):
            axes.set_yscale("log")
        of_epochs(axes)
        axes.grid(visible=True, linewidth=0.4, alpha=0.5)
    finish(axes)
    figure.tight_layout()
    return figure


_Lines = list[tuple[str, "Look", list[list[float]]]]


def _curves(
    rows: Sequence[tuple[str, Look, Sequence[Sequence[Record]]]],
    value: Callable[[Record], float | None],
) -> _Lines:
    """Name, look and the runs' curves of each row that has any."""
    lines = []
    for name, look, runs in rows:
        curves = [[v for epoch in epochs if (v := value(epoch)) is not None] for epochs in runs]
        if any(curves):
            lines.append((name, look, [curve for curve in curves if curve]))
    return lines


def _draw_range(axes: Axes, name: str, look: Look, curves: Sequence[Sequence[float]]) -> None:
    epochs = range(1, 1 + min(map(len, curves)))
    columns = list(zip(*(curve[: len(epochs)] for curve in curves), strict=True))
    means = [sum(c) / len(c) for c in columns]
    axes.plot(epochs, means, label=name, lw=1.3, color=look.colour, linestyle=look.line)
    axes.fill_between(epochs, [min(c) for c in columns], [max(c) for c in columns],
                      color=look.colour, alpha=0.18, linewidth=0)  # fmt: skip


def _above_zero(lines: _Lines) -> bool:
    return all(v > 0 for _, _, curves in lines for curve in curves for v in curve)


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
