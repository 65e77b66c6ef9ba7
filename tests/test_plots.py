"""Plots of many rows: no two look the same, the plain one is grey and first, epochs are whole."""

from __future__ import annotations

import itertools

import pytest
from matplotlib.colors import to_rgb

from hesstrace_cli.reporting import comparisons, plots, spectra

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
    assert len({to_rgb(look.colour) for look in found.values()}) == len(names)
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
    figures = [
        comparisons.plot_metric(runs),
        comparisons.plot_curves(runs),
        comparisons.plot_layers_by_row(runs),
    ]
    for figure in figures:
        for axes in figure.axes[-1:]:
            legend = axes.get_legend()
            texts = [t.get_text() for t in (axes.texts if legend is None else legend.get_texts())]
            assert sorted(texts) == sorted(NAMES)
    assert texts[0] == "none"
    points = [c for c in figures[0].axes[0].collections]
    assert len({(str(c.get_facecolor()), str(c.get_paths()[0].vertices)) for c in points}) == 25
    lines = figures[1].axes[0].lines
    assert len({(line.get_color(), str(line._dash_pattern)) for line in lines}) == len(NAMES)
    bars = figures[2].axes[0].patches
    assert len({(bar.get_facecolor(), bar.get_hatch()) for bar in bars}) == len(NAMES)


@pytest.mark.parametrize("epochs", [2, 3, 5, 40])
def test_axes_of_epochs_have_whole_numbers(tmp_path, epochs):
    records = [a_record("none-seed0", e) for e in range(1, epochs + 1)]
    for figure in (plots.plot_traces(records), comparisons.plot_curves(summaries(tmp_path))):
        figure.canvas.draw()
        for axes in figure.axes:
            ticks = axes.get_xticks()
            assert all(tick == round(tick) for tick in ticks), ticks


@pytest.mark.parametrize("draw", [comparisons.plot_metric, comparisons.plot_curves])
def test_names_hide_neither_points_nor_each_other(tmp_path, draw):
    for axes in (figure := draw(summaries(tmp_path))).axes:
        assert axes.get_legend() is None
        places = [text.xyann for text in axes.texts]  # in parts of the axes
        assert len(places) == len(NAMES)
        assert min(x for x, _ in places) > 1
        heights = sorted(y for _, y in places)
        inches = figure.get_figheight() * axes.get_position().height
        assert min(b - a for a, b in itertools.pairwise(heights)) * inches > 0.12
        assert (heights[0], heights[-1]) > (-0.5, 0)
        assert heights[-1] < 1.5


def test_a_name_is_tied_to_a_run(tmp_path):
    made = summaries(tmp_path)[0]
    points = [(1.0, 0.5), (10.0, 0.7), (500.0, 0.95)]
    runs = [
        {**made, "seed": seed, "test_accuracy": y, "trace": {**made["trace"], "trace": x}}
        for seed, (x, y) in enumerate(points)
    ]
    (axes,) = comparisons.plot_metric(runs).axes
    assert [text.xy for text in axes.texts] == [(10.0, 0.7)]


def a_row(name, difference=0.0, **changes):
    spread = {"mean": 0.5 + difference, "std": 0.1, "ci95": [0.4, 0.6]}
    own = {"mean": difference, "ci95": [difference - 0.1, difference + 0.1], "p_holm": 0.01}
    return {
        "regularizer": name, "selection": {"metric": "accuracy", "higher_is_better": True},
        "num_seeds": 3, "num_diverged": 0, "num_unfinished": 0, "num_collapsed": 0,
        "test_accuracy": spread, "test_loss": spread, "metrics": {"accuracy": spread},
        "difference_to_none": None if name == "none" else {
            "test_accuracy": own, "test_loss": {**own, "p_holm": 0.2}, "metrics": {}},
        **changes,
    }  # fmt: skip


def test_the_forest_of_differences():
    rows = [a_row("trace=0.1", 0.02), a_row("none"), a_row("sam=0.1", -0.01, num_unfinished=7),
            a_row("trace=9", 1e9, num_collapsed=3),
            a_row("trace=99", 1e9, num_seeds=0, num_diverged=3)]  # fmt: skip
    figure = comparisons.plot_differences(rows)
    left, right = figure.axes
    names = [text.get_text() for text in left.get_yticklabels()]
    assert names == ["none", "trace=0.1", "sam=0.1", "trace=9", "trace=99"]
    assert left.get_ylim() == (4.5, -0.5)  # the first is above
    assert figure.get_suptitle().startswith("15 of 22 runs, ")
    for axes, filled in ((left, True), (right, False)):
        assert max(map(abs, axes.get_xlim())) < 1  # the collapsed do not squeeze the others
        points = [c.lines[0] for c in axes.containers]
        assert [float(p.get_xdata()[0]) for p in points] == [0.02, -0.01]
        assert all((p.get_markerfacecolor() != "white") == filled for p in points)
        (ends,) = axes.containers[0].lines[2]
        assert ends.get_segments()[0][:, 0] == pytest.approx([-0.08, 0.12])
        words = [text.get_text() for text in axes.texts]
        assert words == ["0.5", "3 collapsed of 3", "3 diverged of 3"]
    labels = left.get_yticklabels()
    assert len({to_rgb(label.get_color()) for label in labels}) == len(rows)
    assert len(set(to_rgb(labels[0].get_color()))) == 1
    assert "right is better" in left.get_xlabel()
    assert "left is better" in right.get_xlabel()
    assert comparisons.plot_differences(rows[1:2]) is None


def test_tiny_differences_have_no_common_factor_in_the_label():
    own = {"mean": 1e-9, "ci95": [-1e-9, 3e-9], "p_holm": None}
    of = {"test_accuracy": own, "test_loss": own, "metrics": {}}
    figure = comparisons.plot_differences([a_row("none"), a_row("sam=1", difference_to_none=of)])
    figure.draw_without_rendering()
    for axes in figure.axes:
        assert axes.xaxis.get_offset_text().get_text() == ""
        assert "e-09" in axes.get_xticklabels()[-1].get_text().replace("\N{MINUS SIGN}", "-")


def test_collapsed_networks_are_named_and_hide_no_others(tmp_path):
    runs = summaries(tmp_path)
    lost = {**runs[0], "trace": {**runs[0]["trace"], "trace": 0.0}, "collapsed": "as shares"}
    (axes,) = comparisons.plot_metric([lost, *runs]).axes
    assert axes.get_title(loc="left") == f"not shown, collapsed: {NAMES[0]} (1 of 2)"
    assert sum(len(points.get_offsets()) for points in axes.collections) == len(runs)
    assert axes.get_xscale() == "log"
    (axes,) = comparisons.plot_metric([lost]).axes  # where there are no others
    assert len(axes.collections) == 1


def test_names_that_differ_where_they_are_cut_are_whole():
    several = [
        f"trace=0.01,draw={draw},keep-prob=0.25,num-probes=2" for draw in ("signs", "labels")
    ]
    for names in (several, [*several, "none"]):
        assert len({*plots.drawn_names(names)}) == len(names)
    assert plots.drawn_names([several[0], "none"])[0] != several[0]  # cut


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
