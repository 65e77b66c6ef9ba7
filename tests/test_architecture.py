"""Who may import whom, as docs/architecture.md has it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hesstrace_cli"
FACES = {"__init__", "__main__"}


def lines_of_rooms():
    """The rooms of each line of the document's table."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d) \| (.*?) \|", text, re.MULTILINE)
    return {
        room.strip("`/").removesuffix(".py"): int(number)
        for number, rooms in rows
        for room in re.findall(r"`[^`]+`", rooms)
    }


LINE = lines_of_rooms()


def room_of(file):
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(file):
    """The rooms that a file imports from, those of lazy imports too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            _, *rest = str(node.module).split(".")
            yield from [rest[0]] if rest else [alias.name for alias in node.names]
        if isinstance(node, ast.Import):
            for alias in node.names:
                first, *rest = alias.name.split(".")
                if first == PACKAGE.name and rest:
                    yield rest[0]


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_room_has_its_line():
    """A module that lies loose, or a new folder, is none of the document's."""
    rooms = {room_of(file) for file in FILES} - FACES
    assert rooms == set(LINE)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_file_imports_from_lines_above_alone(file):
    room = room_of(file)
    if room in FACES:
        return
    for other in set(imported_rooms(file)) & set(LINE):
        if other != room and not LINE[other] == LINE[room] == 1:
            assert LINE[other] < LINE[room], f"{room} imports {other}"


def test_only_cli_and_reporting_draw():
    for file in FILES:
        if room_of(file) not in ("cli", "reporting"):
            assert not re.search(r"^\s*(from|import) (rich|typer)", file.read_text(), re.MULTILINE)
