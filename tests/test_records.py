"""Every JSON record against its type, and its type against the document."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from typing_extensions import NotRequired, is_typeddict

from hesstrace_cli import records
from tests.conftest import TINY, invoke

DOCUMENT = (Path(__file__).parents[1] / "docs" / "records.md").read_text()
TYPES = {name: kind for name, kind in vars(records).items() if is_typeddict(kind)}


def documented():
    """The keys of each section's table."""
    for section in re.split(r"^## ", DOCUMENT, flags=re.MULTILINE)[1:]:
        title, _, text = section.partition("\n")
        firsts = re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE)
        yield title, [key for cell in firsts for key in re.findall(r"`(\w+)`", cell)]


SECTIONS = dict(documented())


@pytest.mark.parametrize("title", SECTIONS)
def test_the_document_has_the_keys_of_the_type(title):
    assert sorted(SECTIONS[title]) == sorted(TYPES[title].__annotations__)


def test_every_record_with_a_schema_is_in_the_document():
    with_schema = {name for name, kind in TYPES.items() if "schema" in kind.__annotations__}
    with_schema -= {"ModelSpectrum", "ModelSensitivity"}  # what the records of commands are of
    assert with_schema <= set(SECTIONS)


def problems(value: Any, kind: Any, where: str = ""):
    """Where a value has not its type: no key missing, none that is not declared."""
    if get_origin(kind) is NotRequired:
        (kind,) = get_args(kind)
    if is_typeddict(kind):
        hints = get_type_hints(kind, include_extras=True)
        if not isinstance(value, dict):
            yield f"{where} is {type(value).__name__}"
            return
        missing = kind.__required_keys__ - value.keys()
        if missing or value.keys() - hints.keys():
            yield f"{where} lacks {sorted(missing)}, adds {sorted(value.keys() - hints.keys())}"
        for key in value.keys() & hints.keys():
            yield from problems(value[key], hints[key], f"{where}.{key}")
    elif isinstance(kind, UnionType):
        tried = [list(problems(value, each, where)) for each in get_args(kind)]
        if all(tried):
            yield from min(tried, key=len)
    elif get_origin(kind) in (list, dict):
        holder, inside = get_origin(kind), get_args(kind)[-1]
        if not isinstance(value, holder):
            yield f"{where} is {type(value).__name__}"
            return
        items = value.items() if holder is dict else enumerate(value)
        for key, item in items:
            yield from problems(item, inside, f"{where}[{key}]")
    elif kind is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            yield f"{where} is {type(value).__name__}"
    elif kind is NoneType:
        if value is not None:
            yield f"{where} is not null"
    elif kind is not object and type(value) is not kind:
        yield f"{where} is {type(value).__name__}, not {kind.__name__}"


def check(value, kind):
    assert list(problems(value, kind)) == []


def test_the_check_finds_what_is_wrong():
    good = {"name": "w", "num_parameters": 3, "trace": 1.0, "stderr": None}
    check(good, records.Layer)
    for wrong in ({"name": 1}, {"stderr": "0"}, {"num_parameters": 3.0}, {"more": 1}):
        assert list(problems({**good, **wrong}, records.Layer))
    del good["trace"]
    assert list(problems(good, records.Layer))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("records") / "run"
    result = invoke("train", *TINY, "--reg", "trace=0.001", "--monitor-trace", "1", "--out", out)
    assert result.exit_code == 0, result.output
    return out


def written(*arguments):
    result = invoke(*arguments, "--json", "-")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_what_a_run_leaves(run):
    check(json.loads((run / "summary.json").read_text()), records.Run)
    for line in (run / "metrics.jsonl").read_text().splitlines():
        check(json.loads(line), records.Epoch)


def test_what_a_run_without_a_trace_leaves():
    Path("random.py").write_text(
        "from torch import nn\n"
        "class Always(nn.Linear):\n"
        "    def forward(self, X):\n"
        "        return nn.functional.dropout(super().forward(X.flatten(1)), 0.1, training=True)\n"
        "def model(): return Always(64, 10)\n"
    )
    result = invoke("train", "--epochs", "1", "--train-examples", "50", "--model",
                    "random.py:model", "--out", "r")  # fmt: skip
    assert result.exit_code == 0, result.output
    summary = json.loads(Path("r/summary.json").read_text())
    check(summary, records.Run)
    assert summary["trace"]["trace"] is None
    assert "random numbers" in summary["trace"]["reason"]


def test_what_commands_write(run):
    few = ("--num-examples", "30")
    last = run / "last.pt"
    check(written("estimate-trace", last, "--report", "--per-layer", *few), records.Trace)
    check(written("estimate-trace", last, "--method", "hutchinson", "--num-probes", "2", *few),
          records.Trace)  # fmt: skip
    check(written("spectrum", last, "--slice", "1", "--steps", "5", *few), records.Spectrum)
    check(written("verify", "--model", "mlp", "--model-arg", "width=2"), records.Verification)
    check(written("sensitivity", last, *few), records.Sensitivity)
    check(written("sensitivity", last, "--average-bits", "4", "--check", *few), records.Sensitivity)


def test_what_a_comparison_writes():
    result = invoke("compare", *TINY, "--reg", "none", "--reg", "label-smoothing", "--seeds", "0,1",
                    "--out", "cmp")  # fmt: skip
    assert result.exit_code == 0, result.output
    check(json.loads(Path("cmp/results.json").read_text()), records.Comparison)
