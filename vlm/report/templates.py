"""The templates of the pages, and how a page is written."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vlm.common import replacing, shorten


def render(template: str, folder: Path = Path(__file__).parent, **values: Any) -> str:
    """A page as text. All that the template is given is escaped, unless it says otherwise.

    Args:
        folder: where the template is.
    """
    room = FileSystemLoader(folder)
    environment = Environment(
        loader=room, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"shorten": shorten, "percent": _percent, "thousands": "{:,}".format}
    return environment.get_template(template).render(values)


def write_page(path: Path, page: str) -> None:
    """Write a page whole or not at all.

    Raises:
        WriteError: it cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(page.encode("utf-8", errors="replace"))  # a file name need not be valid text


def _percent(share: float, digits: int = 1) -> str:
    return f"{share:.{digits}%}"
