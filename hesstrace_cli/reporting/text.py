"""The one place that makes text from outside safe to show: on a screen, in Markdown, CSV, plots.

File names, tensor names, keys and other programs' messages may hold anything: escape sequences,
characters that turn the direction of writing, line breaks, the markup of what shows them.
"""

from __future__ import annotations

import re

_MARKDOWN = re.compile(r"[\\`*_\[\]<>|~&$#@]|:(?=//)|(?<=www)\.", re.IGNORECASE)
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")  # noqa: RUF001  # full-width ones count too
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def for_screen(text: str) -> str:
    """The text on one line, whatever is not plainly visible written as an escape.

    That is all of control, format, direction, line break, surrogate and unassigned characters.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def for_markdown(text: str) -> str:
    """The text as a renderer of Markdown shows it, in a table's cell too."""
    return _MARKDOWN.sub(r"\\\g<0>", for_screen(text))


def for_csv(text: str) -> str:
    """The text as a spreadsheet shows it: one that would be a formula begins with an apostrophe.

    Source:
        OWASP, "CSV injection".
    """
    shown = for_screen(text)
    is_formula = shown.lstrip().startswith(_FORMULA) and not _NUMBER.fullmatch(shown)
    return f"'{shown}" if is_formula else shown


def for_plot(text: str) -> str:
    """The text as matplotlib draws it: no mathematics, and no name that a legend leaves out."""
    shown = for_screen(text).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown
