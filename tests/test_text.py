"""Hostile text from outside through all that a person sees: screen, Markdown, CSV, plots."""

from __future__ import annotations

import csv
import io
import json
import random
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
import torch
from markdown_it import MarkdownIt
from rich.console import Console

from hesstrace_cli.cli import screen
from hesstrace_cli.comparison.table import tabulate, write
from hesstrace_cli.reporting import comparisons, plots, spectra
from hesstrace_cli.reporting.layout import Strong, Table, Words, fitted, markdown_table
from hesstrace_cli.reporting.text import for_csv, for_markdown, for_plot, for_screen
from tests.conftest import TINY, invoke

NASTY = [
    "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x9b31m", "\x00", "a\nb", "a\rb", "a\tb",
    "\x85", "\x7f",
    "\u202eevil\u202c", "\u2066x\u2069", "\u200b\ufeff", "a\u2028b\u2029", "\udcff", "\U000e0041",
    "[/]", "[bold]x[/bold]", "[link=http://x.y]z[/link]", ":smile:", "$x$", "$\\frac{$", "\\$",
    "a|b", "`c`", "**b**", "_x_", "~~s~~", "<img src=x>", "&amp;", "&lt;", "![a](b)", "[a](b)",
    "http://x.y", "www.x.y", "a@b.c", "# h", "\\", "\\|", "=1+1", "+1", "-x", "@SUM(1)", " =1",
    "＝1",  # noqa: RUF001
    "é", "日本", "a b",
]  # fmt: skip


def hostile_texts(count=200):
    g = random.Random(0)
    return [*NASTY, *("".join(g.choices(NASTY, k=4)) for _ in range(count))]


def is_plain(text):
    """Whether a stream's text holds nothing that a terminal acts on, but for its line ends."""
    return all(line.isprintable() for line in text.split("\n"))


@pytest.mark.parametrize("width", [140, 80, 60, 40])
def test_what_reaches_a_screen_is_printable(width):
    texts = hostile_texts()
    assert all(for_screen(t).isprintable() for t in texts)
    assert [for_screen(t) for t in ("é", "日本", "a b", "[/]", "\\")] == [
        "é",
        "日本",
        "a b",
        "[/]",
        "\\",
    ]
    for some in (texts[:3], texts):
        table = Table(some[0], ("name", some[1], "words"), [[t, "0.5", Words(t)] for t in some])
        console = Console(file=io.StringIO(), width=width)
        console.print(fitted(table, width))
        assert is_plain(console.file.getvalue())


def test_every_way_to_the_screen(capsys):
    for text in hostile_texts(40):
        screen.say(text)
        screen.complain(text)
        screen.warn(text, UserWarning, text, 1)
        screen.show(Table(text, (text, text), [[text, Strong(text)]]))
    with screen.Board(1, 1) as board:
        board.show([(NASTY[0], 0, 1)], 1)
    shown = capsys.readouterr()
    assert is_plain(shown.out)
    assert is_plain(shown.err)
    assert shown.err.count("\n") == 3 * len(hostile_texts(40))


def test_nothing_else_writes():
    """No other file of the package has a way to the streams of its own."""
    package = Path(screen.__file__).parents[1]
    for file in package.rglob("*.py"):
        text = file.read_text()
        if file.name != "screen.py":
            assert "Console(" not in text, file
            assert "sys.stdout.write" not in text, file
            assert "sys.stderr.write" not in text, file
            assert "echo(" not in text.replace("screen.echo(", "") or "--version" in text, file


class Cells(HTMLParser):
    """The text of each cell of a rendered page, and the tags that are no table's."""

    def __init__(self):
        super().__init__()
        self.cells, self.tags = [], set()

    def handle_starttag(self, tag, attrs):
        if tag == "td":
            self.cells.append("")
        self.tags.add(tag)

    def handle_data(self, data):
        if self.cells:
            self.cells[-1] += data


def test_markdown_shows_the_text_itself():
    texts = hostile_texts()
    page = MarkdownIt("gfm-like", {"linkify": False}).render(
        markdown_table(("name", "value"), [[t, Strong("0.5")] for t in texts])
    )
    parsed = Cells()
    parsed.feed(page)
    shown = [cell.rstrip("\n") for cell in parsed.cells[::2]]
    assert [" ".join(s.split()) for s in shown] == [" ".join(for_screen(t).split()) for t in texts]
    assert parsed.tags == {"table", "thead", "tbody", "tr", "th", "td", "strong"}
    assert for_markdown("http://x.y www.x.y a@b.c") == r"http\://x.y www\.x.y a\@b.c"
    assert for_markdown("trace=0.01,cutout=16") == "trace=0.01,cutout=16"


def test_csv_holds_no_formula():
    for text in hostile_texts():
        cell = for_csv(text)
        assert cell.isprintable()
        assert not cell.lstrip().startswith(("=", "+", "-", "@", "＝")) or text == "+1"  # noqa: RUF001
    numbers = ("-0.5", "+1", "1e-3", "-1.5E+10", ".5")
    assert [for_csv(n) for n in numbers] == list(numbers)
    assert for_csv("-1+1") == "'-1+1"
    assert for_csv("-0.5; =1") == "'-0.5; =1"


def summary(name, seed=0, **changes):
    layers = [{"name": name, "num_parameters": 3, "trace": 1.0, "stderr": 0.0}]
    return {
        "dataset": name, "model": name, "regularizers": name, "seed": seed, "folder": "none",
        "test_accuracy": 0.9, "test_loss": -0.5, "train_loss": 0.1, "calibration_error": 0.01,
        "trace": {"trace": 2.0, "stderr": 0.3, "per_layer": layers}, **changes,
    }  # fmt: skip


def test_results_of_hostile_names(tmp_path):
    names = hostile_texts(20)
    comparison = tabulate([summary(name) for name in names])
    write(tmp_path, comparison, "")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    assert [row["regularizer"] for row in rows] == [for_csv(name) for name in names]
    assert all(float(row["test_loss_mean"]) == -0.5 for row in rows)
    content = (tmp_path / "results.json").read_text()
    assert is_plain(content)
    assert [row["regularizer"] for row in json.loads(content)["rows"]] == names


def record(name, **changes):
    return {
        "checkpoint": name, "epoch": 1, "curvature": "hessian", "trace": 1.0, "stderr": 0.1,
        "per_layer": [{"name": name, "num_parameters": 2, "trace": 1.0, "stderr": None}],
        "eigenvalues": [1.0], "density": {"grid": [0.0, 1.0], "values": [1.0, 2.0]},
        "stability": None, "slice": {"dimensions": 1, "grid": [0, 1], "losses": [1.0, 2.0]},
        **changes,
    }  # fmt: skip


def test_plots_draw_hostile_names(tmp_path):
    """No mathematics, no markup, no name left out of a legend; any character can be drawn."""
    names = [name for name in hostile_texts(8) if name.strip()]
    figures = [
        comparisons.plot_metric(
            [summary(n, regularizers=n, dataset="d", model="m") for n in names]
        ),
        comparisons.plot_layers_by_row([summary("$x", regularizers=n) for n in names[:4]]),
        plots.plot_traces([record(n) for n in names[:5]]),
        plots.plot_traces([record(n, epoch=None) for n in names]),
        spectra.plot_spectra([record(n) for n in names[:3]]),
        *(plots.plot_traces([record(n)]) for n in names),
    ]
    for number, figure in enumerate(figures):
        assert isinstance(figure, matplotlib.figure.Figure)
        plots.save(figure, str(tmp_path / f"{number}.svg"))
    (axes,) = figures[0].axes
    assert len(axes.texts) == len(names)
    for name in names:
        assert matplotlib.cbook.is_math_text(for_plot(name)) is False


FOLDERS = ["[/]", "\x1b[31m\u202e\n[x]\r\x07", "[bold]$x$|**`<b>", "=1+1 _\u2028\u200b"]


@pytest.mark.parametrize("name", FOLDERS)
def test_every_command_with_a_hostile_folder(tmp_path, name):
    outputs = []

    def run(*arguments, code=0):
        result = invoke(*arguments)
        assert result.exit_code == code, result.output + repr(result.exception)
        outputs.append(result)
        return result

    (tmp_path / name).mkdir(parents=True)
    out = tmp_path / name / name
    last = out / "last.pt"
    run("train", *TINY, "--reg", "trace", "--out", out)
    run("train", *TINY, "--out", out, code=2)
    run("train", "--resume", "--out", out)
    flags = ("--num-examples", "40", "--plot", tmp_path / name / "p.png")
    run("estimate-trace", last, "--per-layer", "--report", *flags)
    run("estimate-trace", last, tmp_path / f"{name}.pt", "--json", "-", code=4)
    run("estimate-trace", last, "--model", f"{name}.py:{name}", code=4)
    small = ("--steps", "4", "--num-probes", "1", "--top", "1", "--max-products", "8")
    run("spectrum", last, "--num-examples", "40", "--num-directions", "1", *small, *flags[2:])
    run("compare", tmp_path / name)
    (tmp_path / "m.py").write_text("import torch\ndef build(): return torch.nn.Linear(3, 2)\n")
    (tmp_path / "m.py").rename(tmp_path / f"{name.strip()}.py")
    run("verify", "--model", f"{tmp_path / name.strip()}.py:build", code=4)
    for flag in ("--dataset", "--reg", "--device", "--method", "--model", name):
        outputs.append(invoke("estimate-trace", last, flag, f"{name}/x"))
        assert outputs[-1].exit_code in (2, 3, 4)
    for result in outputs:
        assert is_plain(result.stdout), result.stdout
        assert is_plain(result.stderr), result.stderr
    for file in ("results.md", "results.csv", "results.json"):
        assert is_plain((tmp_path / name / file).read_text())


def test_hostile_tensor_names_and_keys(tmp_path, checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    for name in NASTY:
        content["state_dict"] = {name: torch.zeros(1)}
        torch.save(content, tmp_path / "c.pt")
        result = invoke("estimate-trace", tmp_path / "c.pt")
        assert result.exit_code == 4
        assert is_plain(result.stderr)
        assert result.stderr.splitlines()[-1].startswith("error: ")
    torch.save({"a\n\x1b[2J\u202e": 1}, tmp_path / "k.pt")
    np.savez(tmp_path / "d.npz", **{"x\n\x1b[2J\u202e": np.zeros(1)})
    for arguments, code in (
        (("estimate-trace", tmp_path / "k.pt"), 4),
        (("train", "--dataset", tmp_path / "d.npz"), 3),
    ):
        result = invoke(*arguments)
        assert result.exit_code == code
        assert is_plain(result.stderr)


def test_a_plan_is_one_command_a_line(tmp_path):
    for name in ("a b", "[/]$x;'\"", "日本", "-x"):
        plan = invoke("compare", "--seeds", "0", "--out", tmp_path / name, "--plan")
        assert plan.exit_code == 0
        assert plan.stdout.count("\n") == 2
    for name in ("a\nb", "a\x1b[2Jb", "\u202e", "\udcff"):
        plan = invoke("compare", "--seeds", "0", "--out", tmp_path / name, "--plan")
        assert (plan.exit_code, plan.stdout) == (2, "")
        assert "rename" in plan.stderr


def test_a_bug_and_a_warning_of_others_are_made_safe(tmp_path):
    (tmp_path / "own.py").write_text(
        "import warnings\n"
        "def build():\n"
        "    warnings.warn('\\x1b[31m\\u202e\\n[/]')\n"
        "    raise KeyError('k') from ZeroDivisionError('\\x1b[31m\\u202e\\n[/]')\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "hesstrace_cli", "train", "--model", "own.py:build"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "KeyError" in done.stderr
    assert "UserWarning" in done.stderr
    assert is_plain(done.stderr)
