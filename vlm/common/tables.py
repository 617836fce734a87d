"""Plain text tables for the terminal."""

import unicodedata
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from vlm.common.text import printable


def format_table(rows: Sequence[Sequence[Any]], headers: Sequence[str] | None = None) -> str:
    """A table with aligned columns: numbers to the right, floats with three decimals, None as an empty cell."""
    columns = list(zip(*rows, strict=True))
    lines = [[_cell(value) for value in row] for row in rows]
    if headers is not None:
        lines.insert(0, list(headers))
    if not lines:
        return ""
    widths = [max(text_width(line[i]) for line in lines) for i in range(len(lines[0]))]
    numeric = [_is_numeric(column) for column in columns] or [False] * len(widths)
    if headers is not None:
        lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(map(_pad, line, widths, numeric)).rstrip() for line in lines)


def _is_numeric(column: Sequence[Any]) -> bool:
    return any(map(_is_number, column)) and all(value is None or _is_number(value) for value in column)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if _is_number(value) and not isinstance(value, Integral):
        return f"{value:.3f}"
    return printable(str(value))


def text_width(text: str) -> int:
    """Columns on a terminal: Chinese, Japanese and Korean characters take two, combining ones none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _pad(text: str, width: int, right: bool) -> str:
    space = " " * (width - text_width(text))
    return space + text if right else text + space
