"""What the regularizers declare of themselves, read from their files without importing them.

A help text must not import torch, which the regularizers are made of. Each class says in its body,
as plain values, what its strength means:

    class Mine(Regularizer):
        name = "mine"          # as --reg has it; a user's class is named by its file
        default = 0.01         # strength where none is given
        unit = "weight of ..."
        is_penalty = True      # a weighted term, so that --lambda may name it
        maximum = 1.0          # largest strength allowed
        settings = ("every",)  # of `hesstrace train`, which have no effect without it
        alone_to = "..."       # what only one of those used together may do
        spacing = "whole"      # of its strengths, where that is not "log": see `scales`
        acts_late = True       # what it does is done in the run's last epochs
"""

from __future__ import annotations

import ast
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hesstrace_cli.paths import is_file


@dataclass(frozen=True)
class Declared:
    """One regularizer: what the number behind NAME= means, and what makes it.

    Attributes:
        made_by: Its class, as `module:Class`, imported when it is used.
        name: As `--reg` has it.
        default: The strength used where none is given; None for none.
        unit: What the strength multiplies or measures.
        maximum: Largest value allowed; infinite where any is.
        is_penalty: Whether it adds a weighted term to the loss, so that `--lambda` may name it.
        settings: Those of `hesstrace train` that have no effect without it.
        alone_to: What only one regularizer of those used together may do; empty for nothing.
        spacing: Its strengths are evenly apart on this of `SCALES`; "whole" for whole numbers.
        acts_late: Whether what it does is done in the last epochs of a run, and not seen before.
    """

    made_by: str
    name: str
    default: float | None = None
    unit: str = "strength"
    maximum: float = math.inf
    is_penalty: bool = False
    settings: tuple[str, ...] = ()
    alone_to: str = ""
    spacing: str = "log"
    acts_late: bool = False


_NAMES = [item.name for item in dataclasses.fields(Declared) if item.name != "made_by"]


def declared_in(file: Path, module: str) -> list[Declared]:
    """What the classes in a file declare, those with a name.

    Args:
        file: Python source.
        module: The name it is imported by.
    """
    return [
        Declared(f"{module}:{node.name}", **said)
        for node in _classes(file)
        if "name" in (said := _values(node))
    ]


def declared_by_user(spec: str) -> Declared:
    """What a user's class declares, of which nothing is imported; as usual where it says nothing.

    Args:
        spec: `FILE.py:Class` or `package.module:Class`; of the second the file is not looked for.
    """
    file, _, class_name = spec.rpartition(":")
    usual: dict[str, Any] = {"name": spec, "is_penalty": True}
    if file.endswith(".py") and is_file(file):
        try:
            said = {k: v for n in _classes(Path(file)) if n.name == class_name
                    for k, v in _values(n).items()}  # fmt: skip
        except (OSError, SyntaxError, ValueError):  # importing it will say what is wrong
            said = {}
        return Declared(spec, **{**usual, **said, "name": spec})
    return Declared(spec, **usual)


def _classes(file: Path) -> list[ast.ClassDef]:
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return [node for node in body if isinstance(node, ast.ClassDef)]


def _values(node: ast.ClassDef) -> dict[str, Any]:
    said: dict[str, Any] = {}
    for line in node.body:
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            name = line.targets[0].id
            if name in _NAMES:
                said[name] = ast.literal_eval(line.value)
    return said


def task_names() -> tuple[str, ...]:
    """The tasks of this package."""
    folder = Path(__file__).parents[1] / "tasks"
    return tuple(
        ast.literal_eval(line.value)
        for file in sorted(folder.glob("[!_]*.py"))
        for node in _classes(file)
        for line in node.body
        if isinstance(line, ast.AnnAssign) and line.value is not None
        and isinstance(line.target, ast.Name) and line.target.id == "name"
    )  # fmt: skip


def built_in() -> dict[str, Declared]:
    """The regularizers of this package by name, the trace penalty first."""
    folder = Path(__file__).parents[1] / "regularizers"
    found = [
        each
        for file in sorted(folder.glob("[!_]*.py"))
        for each in declared_in(file, f"hesstrace_cli.regularizers.{file.stem}")
    ]
    return {each.name: each for each in sorted(found, key=lambda each: each.name != "trace")}
