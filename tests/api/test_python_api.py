"""docs/python-api.md, top to bottom in one namespace, as a notebook would run it."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import hesstrace_cli

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "python-api.md").read_text()


def test_the_page_runs_as_it_is_written(capsys):
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 5
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "after .* products", UserWarning)
        warnings.filterwarnings("ignore", ".* eigenvalues were found", UserWarning)
        for block in blocks:
            exec(compile(block, "python-api.md", "exec"), names)
    printed = capsys.readouterr().out
    assert printed.count("sampled trace") == 5
    assert "True []" in printed  # verify
    assert isinstance(names["found"], hesstrace_cli.TraceEstimate)


def test_its_links_lead_somewhere():
    for link in re.findall(r"\]\((?!http)([^)#]+)", PAGE):
        assert (ROOT / "docs" / link).resolve().exists(), link


def test_every_name_of_the_library_is_in_it():
    names = set(hesstrace_cli.__all__) - {"__version__", "ModelSpectrum", "ModelVerification"}
    assert {name for name in names if f"{name}" not in PAGE} <= {"TraceEstimate"}
