"""How things are written in messages, tables and pages."""

from collections.abc import Iterable

from vlm.common.tables import printable

BRIEF = 60  # characters


def shorten(text: str, longest: int) -> str:
    """At most `longest` characters, cut in the middle, because long names often differ at their end."""
    return text if len(text) <= longest else f"{text[: longest * 2 // 3 - 1]}…{text[len(text) - longest // 3 :]}"


def brief(text: object) -> str:
    """A name or value of the user's as it stands in a message: not long, and without control characters."""
    return printable(shorten(str(text), BRIEF))


def listed(names: Iterable[object], most: int = 20) -> str:
    """The first ones of some names of the user's, for a message."""
    shown = list(map(brief, names))
    return ", ".join(shown[:most]) + (", ..." if len(shown) > most else "")


def dtype_name(dtype: object) -> str:
    """The name of a `torch.dtype` as users type it after --dtype, such as bfloat16."""
    return str(dtype).removeprefix("torch.")
