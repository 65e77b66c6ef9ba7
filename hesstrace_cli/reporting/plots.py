"""Plots of trace records, drawn to a file without a display."""

from __future__ import annotations

import colorsys
import io
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hesstrace_cli.errors import ConfigError
from hesstrace_cli.reporting.layout import shortened
from hesstrace_cli.reporting.text import for_plot
from hesstrace_cli.storage.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINE = 0.15  # inches from one name to the next
_BAR, BAR_HEIGHT, MOST_BARS = "#4477aa", 0.22, 60
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
    """How one of several rows is drawn; no two have one colour, but plain networks.

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
        own = [name for name in names if _is_plain(name) == grey]
        colours = [_PLAIN] if grey else _colours(len(own))
        for number, name in enumerate(own):
            style = number // (1 if grey else len(_COLOURS)) % len(_MARKERS)
            found[name] = Look(colours[number % len(colours)], _MARKERS[style], _LINES[style],
                               _HATCHES[style])  # fmt: skip
    return found


def _colours(count: int) -> list[str]:
    """So many colours, no two the same, none grey: all hues where the usual ones are too few."""
    if count <= len(_COLOURS):
        return list(_COLOURS[:count])
    shades = (0.25, 0.38, 0.5)  # neighbours in hue differ in lightness
    parts = [colorsys.hls_to_rgb(i / count, shades[i % 3], 0.8) for i in range(count)]
    return ["#" + "".join(f"{round(255 * part):02x}" for part in own) for own in parts]


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
    """Names beside each other: without what all have in common, whole where cut ones are alike."""
    whole = shortened(names)
    cut = list(map(drawn, whole))
    return [for_plot(name) if cut.count(own) > 1 else own
            for name, own in zip(whole, cut, strict=True)]  # fmt: skip


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
    if len(layers) > MOST_BARS:
        largest = sorted(layers, key=lambda layer: -abs(layer["trace"]))[:MOST_BARS]
        title += f" (the {MOST_BARS} largest of {len(layers)})"
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
    figure, axes = new_figure(6.4, 4.0)
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


def finish(axes: Axes) -> None:
    """Add a grid and, where there is something to name, a legend beside what it might hide."""
    axes.grid(visible=True, linewidth=0.4, alpha=0.5)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)


def name_beside(axes: Axes, points: Sequence[tuple[str, str, float, float]]) -> None:
    """Put names at the right of the axes, each tied to its point; no two overlap.

    Args:
        axes: With its final limits and scales.
        points: Name, colour, x and y.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    gap = _LINE / (figure.get_figheight() * axes.get_position().height)
    heights = [axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[1]
               for _, _, x, y in points]  # fmt: skip
    order = sorted(range(len(points)), key=lambda i: (heights[i], i))
    places: list[float] = []
    for i in order:  # each above the one before
        places.append(max(heights[i], places[-1] + gap if places else 0.0))
    highest = max(1.0, gap * (len(places) - 1))
    for number in reversed(range(len(places))):  # and no higher than there is room
        places[number] = min(places[number], highest)
        highest = places[number] - gap
    for i, place in zip(order, places, strict=True):
        name, colour, x, y = points[i]
        axes.annotate(
            name, (x, y), (1.03, place), textcoords="axes fraction", fontsize=8, color=colour,
            va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "alpha": 0.6,
                        "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 2},
        )  # fmt: skip


def _matrix(record: Record) -> str:
    return "tr(H)" if record["curvature"] == "hessian" else "tr(G)"


def _bars(
    names: Sequence[str],
    values: Sequence[float],
    errors: Sequence[float | None],
    title: str,
    label: str,
) -> Figure:
    figure, axes = new_figure(7.0, 1.0 + BAR_HEIGHT * len(names))
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


def new_figure(
    width: float, height: float, place: tuple[int, int, int] = (1, 1, 1)
) -> tuple[Figure, Axes]:
    """A figure of so many inches, with the axes in the first of its places (rows, columns, 1)."""
    from matplotlib.figure import Figure  # here, as it takes half a second

    figure = Figure(figsize=(width, height))
    return figure, figure.add_subplot(*place)
