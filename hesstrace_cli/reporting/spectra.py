"""Plots of spectrum records: densities, and slices of the loss on one scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hesstrace_cli.reporting.plots import Record, drawn, drawn_names, finish, looks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LEVELS = 14


def plot_spectra(records: Sequence[Record]) -> Figure:
    """A column for the density of each record; below, their slices on one scale."""
    from matplotlib.figure import Figure  # here, as it takes half a second

    dimensions = 0 if records[0]["slice"] is None else records[0]["slice"]["dimensions"]
    rows, columns = 1 + bool(dimensions), len(records)
    figure = Figure(figsize=(max(7.0, 4.6 * columns), 4.0 * rows), layout="constrained")
    grid = figure.add_gridspec(rows, columns)
    densities = [figure.add_subplot(grid[0, i]) for i in range(columns)]
    for axes, record in zip(densities, records, strict=True):
        _density(axes, record)
    _share_limits(densities)
    if dimensions == 1:
        _lines(figure.add_subplot(grid[1, :]), records)
    elif dimensions == 2:
        _contours(figure, [figure.add_subplot(grid[1, i]) for i in range(columns)], records)
    return figure


def _density(axes: Axes, record: Record) -> None:
    """On a log scale, the largest eigenvalues and the threshold marked."""
    grid, values = record["density"]["grid"], record["density"]["values"]
    axes.plot(grid, values, color="#4477aa", linewidth=1.2, label="density")
    floor = max(values) * 1e-7
    axes.set(yscale="log", ylim=(floor, max(values) * 3))
    largest = record["eigenvalues"]
    axes.plot(
        largest, [0.03] * len(largest), "v", color="#cc3311", markersize=6,
        transform=axes.get_xaxis_transform(), label=f"{len(largest)} largest",
    )  # fmt: skip
    stability = record["stability"]
    if stability is not None and stability["threshold"] <= 2 * max(grid[-1], 0):
        axes.axvline(stability["threshold"], color="black", linestyle="--", linewidth=1,
                     label=f"stability threshold, lr {stability['lr']:g}")  # fmt: skip
    name = "H" if record["curvature"] == "hessian" else "G"
    axes.set(xlabel=f"eigenvalue of {name}", ylabel="share of eigenvalues per unit")
    axes.set_title(drawn(str(record["checkpoint"])), fontsize=9, loc="left")
    finish(axes)


def _share_limits(panels: Sequence[Axes]) -> None:
    lows, highs = zip(*(axes.get_xlim() for axes in panels), strict=True)
    floors, tops = zip(*(axes.get_ylim() for axes in panels), strict=True)
    for axes in panels:
        axes.set(xlim=(min(lows), max(highs)), ylim=(min(floors), max(tops)))


def _lines(axes: Axes, records: Sequence[Record]) -> None:
    paths = [str(record["checkpoint"]) for record in records]
    by_path = looks(paths)  # in the order of the panels above
    for record, path, name in zip(records, paths, drawn_names(paths), strict=True):
        losses = [math.nan if x is None else x for x in record["slice"]["losses"]]
        look = by_path[path]
        axes.plot(record["slice"]["grid"], losses, color=look.colour, linestyle=look.line,
                  marker=".", label=name)  # fmt: skip
    axes.set(xlabel="distance along a random direction, share of every filter's norm",
             ylabel="loss")  # fmt: skip
    if all((x or 0) > 0 for record in records for x in record["slice"]["losses"]):
        axes.set_yscale("log")
    finish(axes)


def _contours(figure: Figure, panels: Sequence[Axes], records: Sequence[Record]) -> None:
    """Contours at the same levels in every panel, evenly spaced in the log of the loss."""
    import numpy as np
    from matplotlib.colors import LogNorm

    planes = [np.array(r["slice"]["losses"], dtype=float) for r in records]
    positive = np.concatenate([p[np.isfinite(p) & (p > 0)] for p in planes])
    levels = np.geomspace(positive.min(), positive.max() * 1.0001, _LEVELS)
    filled: Any = None
    for axes, plane, record in zip(panels, planes, records, strict=True):
        grid, scale = record["slice"]["grid"], LogNorm(levels[0], levels[-1])
        shape = np.ma.masked_invalid(plane.T)
        filled = axes.contourf(grid, grid, shape, levels=levels, norm=scale, cmap="viridis")
        axes.contour(grid, grid, shape, levels=levels, colors="white", linewidths=0.4, alpha=0.6)
        axes.plot(0, 0, "+", color="#cc3311", markersize=9)
        axes.set(xlabel="first direction", ylabel="second direction", aspect="equal")
        name = drawn(str(record["checkpoint"]))
        axes.set_title(f"loss around {name}", fontsize=9, loc="left")
    ticks = levels[:: max(1, _LEVELS // 6)]
    bar = figure.colorbar(filled, ax=list(panels), label="loss", ticks=ticks)
    bar.ax.set_yticklabels([f"{t:.3g}" for t in ticks])
    bar.ax.minorticks_off()
