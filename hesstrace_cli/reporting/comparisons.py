"""Plots of a comparison: a row a colour, `none` first and grey, names beside what they name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from hesstrace_cli.reporting.apart import differing, key
from hesstrace_cli.reporting.plots import (
    BAR_HEIGHT,
    MOST_BARS,
    Look,
    Record,
    drawn,
    drawn_names,
    finish,
    looks,
    name_beside,
    new_figure,
    of_epochs,
    plain_first,
)
from hesstrace_cli.storage.records import (
    measure_of,
    read_epochs,
    selected,
    selection_metric,
    task_name,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LONGEST_PART = 60  # characters of a file's name
_PLAIN_KEYS = ("dataset", "model", "task")  # whose values say what they are of
_LEVEL = 0.05


def of_comparison(comparison: Record, summaries: Sequence[Record]) -> list[tuple[str, Figure]]:
    """The plots of a comparison with their files' names, for each group that may be compared.

    Args:
        comparison: Its record.
        summaries: Of its finished runs.
    """
    groups: dict[str, list[Record]] = {}
    for s in summaries:
        groups.setdefault(f"{key(s)} {task_name(s)}", []).append(s)
    found: list[tuple[str, Figure | None]] = []
    for part, own in zip(_parts(list(groups.values())), groups.values(), strict=True):
        metric = selection_metric(own[0]).replace("_", "-")
        rows = [row for row in comparison["rows"] if _is_of(row, own[0], comparison["settings"])]
        found += [
            (f"differences{part}.png", plot_differences(rows)),
            (f"{metric}-trace{part}.png", plot_metric(own)),
            (f"curves{part}.png", plot_curves(own)),
            (f"layers{part}.png", plot_layers_by_row(own)),
        ]
    return [(name, figure) for name, figure in found if figure is not None]


def _is_of(row: Record, run: Record, settings: Sequence[Record]) -> bool:
    """Whether a row is of the group that a run is of."""
    place = all(row[k] == run[k] for k in ("dataset", "model"))
    return place and settings[row["group"]] == run.get("settings", {})


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


def plot_differences(rows: Sequence[Record]) -> Figure | None:
    """A forest plot: each row's mean difference to `none`, with its paired 95 % interval.

    Filled points differ by Holm's p below 5 %. Where every run of a row collapsed or diverged,
    words stand in the place of its point, which would hide the others'.

    Args:
        rows: Of a comparison's record, all of one group.

    Returns:
        The figure; None where there is nothing to compare.
    """
    names = plain_first([row["regularizer"] for row in rows])
    by_name = {row["regularizer"]: row for row in rows}
    own = [by_name[name] for name in names]
    if not any(_difference(row, "test_loss") for row in own):
        return None
    selection = next(row["selection"] for row in own if row["selection"])
    measures = {measure_of(selection["metric"]): selection["higher_is_better"], "test_loss": False}
    measures.pop("loss", None)
    figure, first = new_figure(
        2.0 + 3.2 * len(measures), 1.2 + 0.27 * len(own), (1, len(measures), 1)
    )
    by_row = looks(names)
    for number, (measure, higher) in enumerate(measures.items(), start=1):
        axes = first if number == 1 else figure.add_subplot(1, len(measures), number)
        _draw_forest(axes, own, by_row, measure)
        shown = drawn_names(names) if number == 1 else [""] * len(names)
        axes.set_yticks(range(len(own)), shown, fontsize=8)
        for label, name in zip(axes.get_yticklabels(), names, strict=True):
            label.set_color(by_row[name].colour)
        axes.set_ylim(len(own) - 0.5, -0.5)
        better = "right" if higher else "left"
        axes.set_xlabel(f"{_spelled(measure)} minus none's ({better} is better)", fontsize=9)
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter("{x:g}")  # a common factor would stand in the label
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(visible=True, axis="x", linewidth=0.4, alpha=0.5)
    figure.suptitle(_forest_title(own), fontsize=9, x=0.02, ha="left")
    figure.tight_layout()
    return figure


def _difference(row: Record, measure: str) -> Mapping[str, Any] | None:
    """The row's difference to `none` by a measure or metric; None where there is none."""
    found = row["difference_to_none"]
    if found is None:
        return None
    own = found[measure] if measure in found else found["metrics"][measure]
    return None if own["mean"] is None else own


def _lost(row: Record) -> str:
    """What became of a row of which no run has learnt anything."""
    total = row["num_seeds"] + row["num_diverged"] + row["num_unfinished"]
    lost = row["num_diverged"] + row["num_collapsed"]
    if lost and lost == row["num_seeds"] + row["num_diverged"]:
        words = [f"{row[f'num_{k}']} {k}" for k in ("collapsed", "diverged") if row[f"num_{k}"]]
        return f"{', '.join(words)} of {total}"
    return "" if row["num_seeds"] else f"none of {total} runs is finished"


def _draw_forest(
    axes: Axes, rows: Sequence[Record], by_row: Mapping[str, Look], measure: str
) -> None:
    axes.axvline(0, color=by_row["none"].colour, linewidth=1)
    said = []
    for place, row in enumerate(rows):
        look, difference = by_row[row["regularizer"]], _difference(row, measure)
        words = _lost(row)
        if row["regularizer"] == "none":
            axes.plot(0, place, marker="o", color=look.colour)
            words = words or _mean(row, measure)
        elif difference is not None and not words:
            mean, p = difference["mean"], difference["p_holm"]
            low, high = difference["ci95"] or (mean, mean)
            sure = p is not None and p < _LEVEL
            axes.errorbar(
                mean, place, xerr=[[mean - low], [high - mean]], marker="o", color=look.colour,
                markerfacecolor=look.colour if sure else "white", capsize=3, linewidth=1.2,
            )  # fmt: skip
        if words:
            said.append((words, place, look.colour))
    low, high = axes.get_xlim()
    side = -1 if low + high < 0 else 1  # where there is more room
    for words, place, colour in said:
        axes.annotate(words, (0, place), (8 * side, 0), textcoords="offset points", fontsize=7,
                      color=colour, va="center", ha="right" if side < 0 else "left")  # fmt: skip


def _mean(row: Record, measure: str) -> str:
    spread = row[measure] if measure in row else row["metrics"][measure]
    return "" if spread["mean"] is None else f"{spread['mean']:.4g}"


def _forest_title(rows: Sequence[Record]) -> str:
    ended = sum(row["num_seeds"] + row["num_diverged"] for row in rows)
    total = ended + sum(row["num_unfinished"] for row in rows)
    runs = f"{ended} of {total} runs, " if ended < total else f"{total} runs, "
    return f"{runs}difference with paired 95 % interval over seeds; filled: Holm's p < {_LEVEL:g}"


def plot_metric(summaries: Sequence[Record]) -> Figure | None:
    """The test metric that the task picks by against the trace, a point a run; None without one.

    Networks that have collapsed are far from all others, beside which they are named, not drawn.

    Args:
        summaries: Of runs of one group.
    """
    metric = selection_metric(summaries[0]) if summaries else "accuracy"
    rows, lost = [], list[str]()
    shown = [s for s in summaries if not s.get("collapsed")] or summaries
    for name, look, own in _rows(summaries):
        alive = [s for s in own if s in shown]
        if len(alive) < len(own):
            lost.append(f"{name} ({len(own) - len(alive)} of {len(own)})")
        points = [(x, y) for s in alive if (x := s["trace"]["trace"]) is not None
                  and (y := selected(s, "test", metric)) is not None]  # fmt: skip
        if points:
            rows.append((name, look, points))
    if not rows:
        return None
    figure, axes = new_figure(6.4, max(4.4, 0.22 * len(rows)))
    for name, look, points in rows:
        xs, ys = zip(*points, strict=True)
        axes.scatter(xs, ys, s=26, alpha=0.8, label=name, color=look.colour, marker=look.marker)
    if all(x > 0 for _, _, points in rows for x, _ in points):
        axes.set_xscale("log")
    axes.set(xlabel="tr(H), training data, eval mode", ylabel=f"test {_spelled(metric)}")
    if lost:
        axes.set_title(f"not shown, collapsed: {', '.join(lost)}", fontsize=8, loc="left")
    axes.grid(visible=True, linewidth=0.4, alpha=0.5)
    name_beside(axes, [(name, look.colour, *_middle(points)) for name, look, points in rows])
    return figure


def _middle(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The point nearest to the mean in height: a mean itself is a place where nothing is drawn."""
    mean = fmean(y for _, y in points)
    return min(points, key=lambda point: abs(point[1] - mean))


def _spelled(metric: str) -> str:
    return metric.replace("_", " ")


def plot_layers_by_row(summaries: Sequence[Record]) -> Figure | None:
    """The mean trace of every parameter tensor, a bar a regularizer; None for mixed models."""
    summaries = [s for s in summaries if s["trace"]["per_layer"]]  # of the others it is not known
    rows = _rows(summaries)
    layers = [[layer["name"] for layer in s["trace"]["per_layer"]] for s in summaries]
    if not layers or any(names != layers[0] for names in layers) or len(layers[0]) > MOST_BARS:
        return None
    names = layers[0]
    figure, axes = new_figure(7.0, 1.0 + BAR_HEIGHT * len(names) * max(1.0, 0.35 * len(rows)))
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
        summaries: Of runs of one group.
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
    size = (6.2 * len(shown), max(3.8, 0.22 * len(rows)))
    figure, first = new_figure(*size, (1, len(shown), 1))
    for number, (label, lines) in enumerate(shown.items(), start=1):
        axes = first if number == 1 else figure.add_subplot(1, len(shown), number)
        ends = [_draw_range(axes, name, look, curves) for name, look, curves in lines]
        axes.set(xlabel="epoch", ylabel=label)
        if label.startswith("training") and _above_zero(lines):
            axes.set_yscale("log")
        of_epochs(axes)
        axes.grid(visible=True, linewidth=0.4, alpha=0.5)
        name_beside(axes, ends)
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


def _draw_range(
    axes: Axes, name: str, look: Look, curves: Sequence[Sequence[float]]
) -> tuple[str, str, float, float]:
    """Draw a row; its name, colour and where its line ends."""
    epochs = range(1, 1 + min(map(len, curves)))
    columns = list(zip(*(curve[: len(epochs)] for curve in curves), strict=True))
    means = [sum(c) / len(c) for c in columns]
    axes.plot(epochs, means, label=name, lw=1.3, color=look.colour, linestyle=look.line)
    axes.fill_between(epochs, [min(c) for c in columns], [max(c) for c in columns],
                      color=look.colour, alpha=0.18, linewidth=0)  # fmt: skip
    return name, look.colour, epochs[-1], means[-1]


def _above_zero(lines: _Lines) -> bool:
    return all(v > 0 for _, _, curves in lines for curve in curves for v in curve)


def _rows(summaries: Sequence[Record]) -> list[tuple[str, Look, list[Record]]]:
    """Name, look and runs of each row, the plain network first."""
    rows: dict[str, list[Record]] = {}
    for s in summaries:
        rows.setdefault(s["regularizers"], []).append(s)
    order = plain_first(rows)
    by_name = looks(order)
    return [(name, by_name[row], rows[row])
            for row, name in zip(order, drawn_names(order), strict=True)]  # fmt: skip
