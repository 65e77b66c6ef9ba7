"""The how-to pages: their files are written and their commands run, in the order of the page."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "how-to").glob("*.md"))
OF_THE_PACKAGE = re.compile(r"# (hesstrace_cli/\S+)\n")


def blocks(page):
    """Kind and text of each block of code."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def test_there_is_a_page_for_each_thing_to_add():
    assert {page.stem for page in PAGES} == {
        "task",
        "regularizer",
        "estimator",
        "model",
        "data-set",
        "norm-rule",
    }


LONG = ("data-set", "regularizer", "model", "task")  # with several runs each


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=[pytest.mark.slow] if p.stem in LONG else []) for p in PAGES],
    ids=lambda page: page.stem,
)
def test_a_page_works_as_it_is_written(page, tmp_path):
    """Files of the package go into a copy of it, so that nothing else has to be touched."""
    found = blocks(page)
    assert {kind for kind, _ in found} == {"python", "sh"}
    package = tmp_path if any(OF_THE_PACKAGE.match(text) for _, text in found) else ROOT
    if package is tmp_path:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "hesstrace_cli", tmp_path / "hesstrace_cli", ignore=ignored)
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    for kind, text in found:
        if kind == "python":
            name = re.match(r"# (\S+)\n", text)
            assert name is not None, text
            (tmp_path / name[1]).write_text(text)
            continue
        for line in text.splitlines():
            program, *words = shlex.split(line)
            if program == "hesstrace":
                words = ["-m", "hesstrace_cli", *words]
                words += ["--train-examples", "40"] if words[2] in ("train", "compare") else []
            else:
                assert program == "python", line
            done = subprocess.run(
                [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True,
                text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, (line, done.stderr[-2000:])
