"""Plots of many rows: no two look the same, the plain one is grey and first, epochs are whole."""

from __future__ import annotations

import itertools

import pytest
from matplotlib.colors import to_rgb

from hesstrace_cli.reporting import plots, spectra

NAMES = ["trace=0.1", "cutout=16", "none", *(f"trace=0.{i:02}" for i in range(20, 42))]


def a_record(folder, epoch, **more):
    return {"checkpoint": f"runs/digits-small-cnn-{folder}/epoch-{epoch:04d}.pt", "epoch": epoch,
            "curvature": "hessian", "trace": 10.0 + epoch, "stderr": 0.5, **more}  # fmt: skip


def summaries(folder):
    found = []
    for number, name in enumerate(NAMES):
        run = folder / str(number)
        run.mkdir()
        lines = [f'{{"epoch": {e}, "train_loss": {1 / e}, "val_accuracy": 0.5}}' for e in (1, 2, 3)]
        (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        layers = [{"name": "w", "trace": 1.0}]
        found.append({
            "dataset": "d", "model": "m", "regularizers": name, "folder": str(run),
            "test_accuracy": 0.9, "trace": {"trace": 1.0 + number, "per_layer": layers},
        })  # fmt: skip
    return found


def test_looks_are_distinct_and_grey_is_for_the_plain_network():
    names = [*(f"row {i}" for i in range(90)), "none"]
    found = plots.looks(names)
    for part in ("marker", "line", "hatch"):
        seen = {(look.colour, getattr(look, part)) for look in found.values()}
        assert len(seen) == len(names)
    greys = [name for name, look in found.items() if len(set(to_rgb(look.colour))) == 1]
    assert greys == ["none"]
    for plain in ("digits mlp none", "runs/digits-mlp-none-seed3", "c/none/last.pt", "none"):
        assert plots.looks([plain])[plain].colour == found["none"].colour
    for other in ("none-such", "trace=0.1", "runs/digits-mlp-nso0.1-seed0", "nonesuch"):
        assert plots.looks([other])[other].colour != found["none"].colour


def test_rows_of_each_plot(tmp_path):
    runs = summaries(tmp_path)
    figures = [plots.plot_metric(runs), plots.plot_curves(runs), plots.plot_layers_by_row(runs)]
    for figure in figures:
        (legend,) = [a.get_legend() for a in figure.axes if a.get_legend() is not None]
        texts = [text.get_text() for text in legend.get_texts()]
        assert texts[0] == "none"
        assert sorted(texts) == sorted(NAMES)
    points = [c for c in figures[0].axes[0].collections]
    assert len({(str(c.get_facecolor()), str(c.get_paths()[0].vertices)) for c in points}) == 25
    lines = figures[1].axes[0].lines
    assert len({(line.get_color(), str(line._dash_pattern)) for line in lines}) == len(NAMES)
    bars = figures[2].axes[0].patches
    assert len({(bar.get_facecolor(), bar.get_hatch()) for bar in bars}) == len(NAMES)


@pytest.mark.parametrize("epochs", [2, 3, 5, 40])
def test_axes_of_epochs_have_whole_numbers(tmp_path, epochs):
    records = [a_record("none-seed0", e) for e in range(1, epochs + 1)]
    for figure in (plots.plot_traces(records), plots.plot_curves(summaries(tmp_path))):
        figure.canvas.draw()
        for axes in figure.axes:
            ticks = axes.get_xticks()
            assert all(tick == round(tick) for tick in ticks), ticks


def test_titles_and_legends_are_short():
    long = "a-very-long-name-of-somebody-s-run/" * 6
    one = [a_record(long, 1, per_layer=[{"name": long, "num_parameters": 1, "trace": 1.0,
                                         "stderr": None}])]  # fmt: skip
    several = [a_record(f"{long}{i}", e) for i, e in itertools.product(range(12), (1, 2))]
    spectrum = [
        {**record, "eigenvalues": [1.0], "stability": None,
         "density": {"grid": [0.0, 1.0], "values": [1.0, 2.0]},
         "slice": {"dimensions": 1, "grid": [0, 1], "losses": [1.0, 2.0]}}
        for record in several[:3]
    ]  # fmt: skip
    for figure in (plots.plot_traces(one), plots.plot_traces(several),
                   spectra.plot_spectra(spectrum)):  # fmt: skip
        for axes in figure.axes:
            legend = axes.get_legend()
            texts = [] if legend is None else legend.get_texts()
            shown = [axes.get_title(loc="left"), *(t.get_text() for t in texts)]
            assert max(map(len, [*shown, *(t.get_text() for t in axes.get_yticklabels())])) <= 70
