"""How things are written in messages, tables, pages and files that other programs read."""

from collections.abc import Iterable, Sequence
from typing import Any

CONTINUED = "\n       "  # the line break of a message: its next line is indented to stand below "error: "
BRIEF = 60  # characters of a name in a message
LONGEST_LINE = 1500  # characters of a line of a message
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet takes for the beginning of a formula


def printable(text: str) -> str:
    """A text in one line that does no harm to a table or a terminal.

    Control characters, line ends and invisible characters, such as those that turn the direction of writing, become
    spaces. A byte of a file name that is not UTF-8, which Python reads as a surrogate, becomes its escape, as in JSON.
    """
    if text.isprintable():
        return text
    return "".join(map(_printable_character, text))


def _printable_character(character: str) -> str:
    if character.isprintable():
        return character
    return f"\\u{ord(character):04x}" if "\ud800" <= character <= "\udfff" else " "


def printable_lines(text: str) -> str:
    """The same for a text of several lines, such as a table."""
    return "\n".join(map(printable, text.split("\n")))


def message_text(text: str) -> str:
    """A message to the user: printable, its lines not endless, and no line break but `CONTINUED`.

    So a file name or the text of a library, which are parts of the message, cannot add lines to it.
    """
    return CONTINUED.join(shorten(printable(line), LONGEST_LINE) for line in text.rstrip().split(CONTINUED))


def csv_cell(value: Any) -> Any:
    """A value for a CSV file. Before a text that a spreadsheet would run as a formula stands an apostrophe."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def utf8_text(text: str) -> str:
    """A text that can be written in UTF-8: what Python reads as a surrogate, such as a byte of a file name that is not
    UTF-8, becomes its escape."""
    return text.encode("utf-8", "backslashreplace").decode()


def shorten(text: str, longest: int) -> str:
    """At most `longest` characters, cut in the middle, because long names often differ at their end."""
    return text if len(text) <= longest else f"{text[: longest * 2 // 3 - 1]}…{text[len(text) - longest // 3 :]}"


def brief(text: object) -> str:
    """A name or value of the user's as it stands in a message: not long, and without control characters."""
    return printable(shorten(str(text), BRIEF))


def joined(names: Sequence[str]) -> str:
    """Names in one line: with commas, or with semicolons if a name has a comma."""
    return ("; " if any("," in name for name in names) else ", ").join(names)


def listed(names: Iterable[object], most: int = 20) -> str:
    """The first ones of some names of the user's, for a message."""
    shown = list(map(brief, names))
    return joined([*shown[:most], "..."] if len(shown) > most else shown)


def size_text(size: float) -> str:
    """A number of bytes in a unit that fits, such as 25.3 MB."""
    unit, name = (1e9, "GB") if size >= 1e8 else (1e6, "MB") if size >= 1e5 else (1e3, "kB")
    return f"{size / unit:,.1f} {name}"


def dtype_name(dtype: object) -> str:
    """The name of a `torch.dtype` as users type it after --dtype, such as bfloat16."""
    return str(dtype).removeprefix("torch.")
