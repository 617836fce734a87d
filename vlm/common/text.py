"""How things are written in messages, tables and pages."""

from collections.abc import Iterable

from vlm.common.tables import printable

LONGEST_LISTED = 60  # characters of a name in a list


def shorten(text: str, longest: int) -> str:
    """At most `longest` characters, cut in the middle, because long names often differ at their end."""
    return text if len(text) <= longest else f"{text[: longest * 2 // 3 - 1]}…{text[len(text) - longest // 3 :]}"


def listed(names: Iterable[object], most: int = 20) -> str:
    """Names of the user's in one line of a message: the first ones, none of them long, without control characters."""
    names = [printable(shorten(str(name), LONGEST_LISTED)) for name in names]
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def dtype_name(dtype: object) -> str:
    """The name of a `torch.dtype` as users type it after --dtype, such as bfloat16."""
    return str(dtype).removeprefix("torch.")
