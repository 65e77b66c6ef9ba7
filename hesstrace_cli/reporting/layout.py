"""Tables that fit a screen: no number is ever cut, broken or left out, however narrow it is.

Where a table is too wide the lines around it go, names lose what they have in common, words wrap;
where that is not enough, each row's cells stand below each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from rich import box
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from hesstrace_cli.reporting.text import for_markdown, for_screen


class Words(str):
    """A cell of words, which may be wrapped between them."""


class Strong(str):
    """A cell to be marked."""


@dataclass(frozen=True)
class Table:
    """What a table shows, from wherever its texts come.

    Attributes:
        title: Above it.
        head: The columns' names.
        rows: Cells; the first of a row is its name, of the others those that are `Words` wrap.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in GitHub's Markdown."""
    lines = [[for_markdown(name) for name in head], ["---", *["---:"] * (len(head) - 1)]]
    for row in rows:
        shown = [for_markdown(cell) for cell in row]
        lines.append([
            f"**{text}**" if isinstance(cell, Strong) else text
            for cell, text in zip(row, shown, strict=True)
        ])  # fmt: skip
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


_SEPARATORS = "/-, "
_NOTHING = ("", "-")
_LEAST_WORDS = 16  # columns that words are given beside a name


def _common(names: Sequence[str]) -> int:
    """How many characters all begin with, in whole parts."""
    same = takewhile(lambda characters: len(set(characters)) == 1, zip(*names, strict=False))
    start = len(list(same))
    while start and names[0][start - 1] not in _SEPARATORS:
        start -= 1
    return start


def common_ends(names: Sequence[str]) -> tuple[int, int]:
    """How many characters all names share at the beginning and at the end, in whole parts."""
    if len(set(names)) < 2:
        return 0, 0
    start = _common(names)
    end = _common([name[start:][::-1] for name in names])
    return start, end


def shortened(names: Sequence[str]) -> list[str]:
    """The names without what all have in common at the beginning and the end."""
    start, end = common_ends(names)
    return [name[start : len(name) - end] for name in names]


def fitted(table: Table, width: int, *, may_stack: bool = True) -> RenderableType:
    """The table in the first of its forms that is not wider than `width`.

    Args:
        table: Its texts are made safe here.
        width: Columns of the screen.
        may_stack: Whether rows too wide are stacked; else their lines are longer, as in a log.
    """
    table = _safe(table)
    for form in (table, _with_short_names(table)):
        natural = _widths(form)
        if sum(natural) + 3 * len(natural) + 1 <= width:
            return _drawn(form, natural, boxed=True)
    room = width - 2 * (len(table.head) - 1)
    for form in (table, _with_short_names(table)):
        widths = _squeezed(form, room)
        if sum(widths) <= room or not may_stack:
            return _drawn(form, widths, boxed=False)
    return _stacked(table, width)


def _safe(table: Table) -> Table:
    rows = [[type(cell)(for_screen(cell)) for cell in row] for row in table.rows]
    return Table(for_screen(table.title), list(map(for_screen, table.head)), rows)


def _with_short_names(table: Table) -> Table:
    names = [row[0] for row in table.rows]
    start, end = common_ends(names)
    if not start + end:
        return table
    pattern = f"{names[0][:start]}...{names[0][len(names[0]) - end :] if end else ''}"
    rows = [[short, *row[1:]] for short, row in zip(shortened(names), table.rows, strict=True)]
    return replace(table, title=f"{table.title} ({pattern})", rows=rows)


def _longest_word(text: str) -> int:
    return max(map(cell_len, text.split()), default=0)


def _columns(table: Table) -> list[list[str]]:
    return [[row[i] for row in table.rows] for i in range(len(table.head))]


def _widths(table: Table) -> list[int]:
    return [
        max(map(cell_len, [name, *cells]))
        for name, cells in zip(table.head, _columns(table), strict=True)
    ]


def _squeezed(table: Table, width: int) -> list[int]:
    """Widths of columns whose words are wrapped to fit into `width`, or as near as they come."""
    least, most = [], []
    for index, (name, cells) in enumerate(zip(table.head, _columns(table), strict=True)):
        whole = [0] + [cell_len(c) for c in cells if index and not isinstance(c, Words)]
        words = [name, *(c for c in cells if not index or isinstance(c, Words))]
        least.append(max(*whole, *map(_longest_word, words)))
        most.append(max(*whole, _longest_word(name), *map(cell_len, words[1:])))
    while sum(most) > max(width, sum(least)):
        spare = [(wide, i) for i, wide in enumerate(most) if wide > least[i]]
        most[max(spare)[1]] -= 1
    return most


def _drawn(table: Table, widths: Sequence[int], *, boxed: bool) -> RenderableType:
    drawn = RichTable(
        box=box.HEAVY_HEAD if boxed else box.SIMPLE_HEAD,
        show_edge=boxed, pad_edge=boxed, padding=(0, 1) if boxed else (0, 1, 0, 0),
    )  # fmt: skip
    for index, (name, wide) in enumerate(zip(table.head, widths, strict=True)):
        of_words = index == 0 or any(isinstance(row[index], Words) for row in table.rows)
        drawn.add_column(Text(name), justify="left" if of_words else "right", width=wide)
    for row in table.rows:
        drawn.add_row(*map(_text, row))
    return Group(Text(table.title, style="italic"), drawn)


def _text(cell: str) -> Text:
    return Text(cell, style="bold" if isinstance(cell, Strong) else "")


def _stacked(table: Table, width: int) -> RenderableType:
    """Each row's name, and below it its other cells, beside their columns' names or below them."""
    label = max(map(cell_len, table.head[1:]), default=0)
    values = [c for row in table.rows for c in row[1:] if not isinstance(c, Words)]
    room = width - label - 4
    beside = room >= max(map(cell_len, values), default=0) and room >= _LEAST_WORDS
    parts: list[RenderableType] = [Text(table.title, style="italic")]
    for row in table.rows:
        parts.append(Text(row[0], style="bold"))
        for name, cell in zip(table.head[1:], row[1:], strict=True):
            if cell in _NOTHING:
                continue
            if beside:
                line = RichTable.grid(padding=(0, 2, 0, 0))
                line.add_column(width=label)
                line.add_column(width=room)
                line.add_row(Text(name), _text(cell))
                parts.append(Padding(line, (0, 0, 0, 2)))
            else:
                parts += [Padding(Text(name), (0, 0, 0, 2)), Padding(_text(cell), (0, 0, 0, 4))]
    return Group(*parts)
