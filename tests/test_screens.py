"""What fits a screen: numbers whole at any width, progress at once, and what is known on Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time

import pytest
from rich.console import Console

from hesstrace_cli.comparison.table import tabulate
from hesstrace_cli.reporting import tables
from hesstrace_cli.reporting.layout import Strong, Table, Words, fitted, shortened
from tests.conftest import TINY, invoke

WIDTHS = [140, 80, 60, 40]


def drawn(table, width, **options):
    console = Console(file=io.StringIO(), width=width if options.get("may_stack", True) else 10**6)
    console.print(fitted(table, width, **options))
    return console.file.getvalue()


def made_table(seed):
    """A table of random numbers and names as long as names are."""
    g = random.Random(seed)

    def cell():
        value = f"{g.uniform(-1, 1) * 10 ** g.randint(-4, 6):#.4g}"
        error = f"{value} ± {g.random():.2g}"
        interval = f"{value} [{g.uniform(-1, 1):+.4f}, {g.random():+.4f}] p={g.random():.2g}"
        return g.choice([value, error, interval, Strong(error), "-", f"{value} (exact)"])

    columns, prefix = g.randint(1, 7), "runs/digits-small-cnn-" * g.randint(0, 2)
    names = [f"{prefix}trace0.{i}-seed{i}" + "/last.pt" * (seed % 2) for i in range(3)]
    return Table("title of it", ("name", *(f"test column {i}" for i in range(columns))),
                 [[n, *(cell() for _ in range(columns))] for n in names])  # fmt: skip


@pytest.mark.parametrize("width", WIDTHS)
def test_every_number_is_shown_whole(width):
    for seed in range(60):
        table = made_table(seed)
        text = drawn(table, width)
        assert max(len(line) for line in text.splitlines()) <= width
        for row in table.rows:
            for cell in row[1:]:
                parts = [cell] if len(cell) <= width - 4 else cell.split()
                assert cell == "-" or all(p in text for p in parts), (seed, cell, text)
        numbers = sum(cell != "-" for row in table.rows for cell in row[1:])
        assert numbers <= len(re.findall(r"\d", text))
        assert all(end in text.replace("\n", "") for end in shortened([r[0] for r in table.rows]))


def a_summary(name, seed):
    return {
        "dataset": "digits", "model": "mlp", "regularizers": name, "seed": seed, "folder": "f",
        "test_accuracy": 0.98 + seed / 300, "test_loss": 0.123 + seed / 7, "train_loss": 0.1,
        "trace": {"trace": 212.345 + seed, "stderr": 0.3}, "calibration_error": 0.0123 * (1 + seed),
    }  # fmt: skip


@pytest.mark.parametrize("width", WIDTHS)
def test_a_comparison_fits(width):
    names = ("none", "trace=0.01", "label-smoothing=0.1,cutout=16,mixup=0.2")
    comparison = tabulate([a_summary(n, s) for n in names for s in (0, 1, 2)])
    for table in tables.comparison_tables(comparison, several=False):
        text = drawn(table, width)
        assert max(map(len, text.splitlines())) <= width
        for row in table.rows:
            assert all(cell in text for cell in row[1:] if cell != "-")


def test_words_are_wrapped_and_kept():
    words = "1.2e-05 off by differences of steps 1e-5, with some more words to explain it at length"
    table = Table("t", ("check", "verdict", "detail"), [["train: tr(G)", "right", Words(words)]])
    for width in WIDTHS:
        text = drawn(table, width)
        assert max(map(len, text.splitlines())) <= width
        assert all(word in text for word in words.split())


def test_names_lose_what_they_share():
    assert shortened(["r/a-1/last.pt", "r/a-2/last.pt"]) == ["1", "2"]
    assert shortened(["a/last.pt", "a/b/last.pt"]) == ["last.pt", "b/last.pt"]
    assert shortened(["one/last.pt"]) == ["one/last.pt"]
    assert shortened(["x", "x"]) == ["x", "x"]
    assert shortened(["trace=0.01", "trace=0.1"]) == ["trace=0.01", "trace=0.1"]
    for names in (["a", "a/"], ["", "a"], ["/", "//"], ["a-", "a-b"], ["-a", "b-a", "a"]):
        assert len(set(shortened(names))) == len(names)


def test_a_log_has_a_row_a_line():
    table = made_table(5)
    text = drawn(table, 140, may_stack=False)
    assert all(sum(row[0].removeprefix("runs/") in line or row[0][-12:] in line
                   for line in text.splitlines()) >= 1 for row in table.rows)  # fmt: skip
    assert len(text.splitlines()) <= 9


def in_terminal(arguments, columns, until, timeout=60):
    """Run the program in a terminal of so many columns; what it wrote until then, and its code."""
    pty, fcntl, termios = (pytest.importorskip(m) for m in ("pty", "fcntl", "termios"))
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm"}
    environment.pop("COLUMNS", None)
    command = [sys.executable, "-m", "hesstrace_cli", *map(str, arguments)]
    process = subprocess.Popen(
        command, stdin=child, stdout=child, stderr=child, env=environment, close_fds=True
    )
    os.close(child)
    text, began, stopped = "", time.monotonic(), False
    while time.monotonic() - began < timeout:
        try:
            text += os.read(parent, 1 << 16).decode(errors="replace")
        except OSError:  # the other end is closed
            break
        if until is not None and until in text and not stopped:
            process.send_signal(signal.SIGINT)
            stopped = True
    os.close(parent)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text), process.wait(timeout=30)


def test_epoch_lines_bar_and_time_left_on_a_narrow_terminal(tmp_path):
    text, code = in_terminal(("train", *TINY[2:], "--epochs", "4", "--out", "r"), 80, None)
    assert code == 0, text
    assert "loading digits and small-cnn" in text
    for epoch in range(1, 5):
        assert f"epoch {epoch}/4 loss " in text
    assert re.search(r"\d+% \d:\d\d:\d\d epoch \d/4 none", text)
    assert "evaluating" in text


def test_ctrl_c_tells_what_is_known(checkpoint):
    flags = ("--method", "hutchinson", "--rtol", "0", "--max-passes", "1000000")
    text, code = in_terminal(("estimate-trace", checkpoint, checkpoint, *flags), 80, "pass 4,")
    assert code == 130, text
    assert "(1 of 2)" in text
    last = " ".join(text[text.rindex("error: interrupted") :].split())
    assert re.search(r"trace \S+ ± \S+ after \d+ passes$", last), last


def test_ctrl_c_keeps_the_checkpoints_before(checkpoint, tmp_path, monkeypatch):
    from hesstrace_cli.analysis import estimation

    own = estimation.estimate_checkpoint

    def second_is_interrupted(path, *arguments):
        if path.endswith("best.pt"):
            raise KeyboardInterrupt
        return own(path, *arguments)

    monkeypatch.setattr(estimation, "estimate_checkpoint", second_is_interrupted)
    paths = (checkpoint, checkpoint.with_name("best.pt"), checkpoint)
    result = invoke("estimate-trace", *paths, "--json", tmp_path / "t.json")
    assert result.exit_code == 130
    assert "last.pt" in result.stdout
    assert "nothing is known of it" in result.stderr
    assert len(json.loads((tmp_path / "t.json").read_text())["traces"]) == 1
