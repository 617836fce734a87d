"""HTML out of Python values: whatever is not marked as HTML is escaped, so that no class name or file name can become
markup."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image

THUMBNAIL = 128  # pixels, the longer side
SMALL = 64  # pixels; an image that is no larger is kept as it is, without loss
LONGEST_TEXT = 400  # characters of an explanation, a setting or a file name
VOID = {"br", "img", "meta"}  # elements that have no end tag


class Markup(str):
    """HTML that this program wrote. Added to a plain string it is a plain string again, and would be escaped."""


def element(tag: str, *children: Any, **attributes: Any) -> Markup:
    """`<tag attributes>children</tag>`, with everything escaped that is not `Markup`.

    Args:
        children: numbers and strings are text; None is left out.
        attributes: `class_` is written class, `aria_label` aria-label; None is left out.
    """
    given = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{tag}{given}>" if tag in VOID else f"<{tag}{given}>{join(children)}</{tag}>")


def join(parts: Iterable[Any]) -> Markup:
    """The parts one after the other, each escaped that is not `Markup`; None is left out."""
    return Markup(
        "".join(part if isinstance(part, Markup) else html.escape(str(part)) for part in parts if part is not None)
    )


def shorten(text: str, longest: int) -> str:
    """At most so many characters, cut in the middle, since long names often differ at the end."""
    return text if len(text) <= longest else f"{text[: longest * 2 // 3 - 1]}…{text[len(text) - longest // 3 :]}"


def class_name(name: str, longest: int = 40) -> Markup:
    """A class name; a long one is cut, and whole when the pointer rests on it."""
    cut = shorten(name, longest)
    return element("span", cut, class_="name", title=None if cut == name else shorten(name, 200))


def thumbnail(image: Image.Image, alt: str) -> Markup:
    """A small copy of an image within the page itself."""
    small = max(image.size) <= SMALL
    copy = image.copy()
    copy.thumbnail((THUMBNAIL, THUMBNAIL))
    address = data_address(copy, "PNG") if small else data_address(copy, "JPEG", quality=80)
    return element("img", class_="thumb coarse" if small else "thumb", src=address, alt=alt)


def data_address(image: Image.Image, kind: str, **options: Any) -> str:
    """An image as a `data:` address."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def table(headers: list[Any], rows: Iterable[list[Any]], caption: str | None = None) -> Markup:
    """A table whose first column is text and heads its row; the other columns are numbers, to the right."""
    head = element("tr", *(element("th", header, scope="col") for header in headers))
    body = (
        element("tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:])) for row in rows
    )
    parts = element("caption", caption) if caption else None, element("thead", head), element("tbody", *body)
    return element("div", element("table", *parts), class_="scroll")


def facts(rows: Sequence[tuple[str, Any]]) -> Markup:
    return element(
        "dl", *(element("div", element("dt", k), element("dd", shorten(str(v), LONGEST_TEXT))) for k, v in rows)
    )


def bar(value: float, low: float | None = None, high: float | None = None) -> Markup:
    """A bar from 0 to 1, with its interval."""
    span = element("i", class_="span", style=f"left:{low:.2%};width:{high - low:.2%}") if low is not None else None
    return element(
        "span", element("i", class_="fill", style=f"width:{value:.2%}"), span, class_="bar", aria_hidden="true"
    )


def percent(share: float) -> str:
    return f"{share:.1%}"


def interval(figure: tuple[float, float | None, float | None], form: str = "{:.1%}") -> str:
    """The interval of (value, low, high) in words; nothing where there is none."""
    _, low, high = figure
    return "" if low is None or high is None else f"{form.format(low)} to {form.format(high)}"
