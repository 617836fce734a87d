"""A cell of an image column -> what `open_image` takes, or in two lines why it is none."""

import base64
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from vlm.common import UsageError, brief, printable
from vlm.data.images import ImageSource, UnreadableImage
from vlm.data.sources.packed import by_names, packed_place
from vlm.data.sources.places import MOST_FILES, Place, is_of_label_studio, locate, say_why

LONGEST_NAME = 255  # bytes of the name of a file on every usual system
SURELY_SHORT = 60  # characters; a text of no more is neither an image in base64 nor a name that is too long
CELLS_TRIED = 100  # the files of these are looked for before anything is decoded
DATA = "data:"
# How JPEG, PNG, GIF, WebP, BMP and TIFF files begin if they are written as base64 text.
BASE64 = re.compile(r"data:image/|(/9j/|iVBORw0KGgo|R0lGOD|UklGR|Qk|SUkq|TU0A)[A-Za-z0-9+/=\s]{50}")
ADDRESS = re.compile(r"(https?|ftp|s3|gs)://", re.IGNORECASE)


@dataclass(frozen=True)
class Cells:
    """The images of a column of a table, found and read only when asked for. Can be pickled.

    cells: the column; place: where its files are; source, column: what both are called in messages.
    """

    cells: Sequence[Any]
    place: Place
    source: str
    column: str

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, row: int) -> ImageSource | None:
        return image_of(self.cells[row], self.place, f"{self.source}: row {row + 1} of the column {self.column}")

    def path(self, row: int) -> str | None:
        """The text in a cell, if it is short enough to be a path."""
        cell = self.cells[row]
        return cell if isinstance(cell, str) and len(cell) <= LONGEST_NAME else None


def image_of(cell: Any, place: Place, name: str) -> ImageSource | None:
    """What `open_image` takes, or None if the cell has no image.

    Args:
        cell: a path, the bytes of an image, also as base64 text or data URI, a decoded image, a list with one of them,
            or a dict with "bytes" or "path".
        place: where files are.
        name: which cell it is, for messages.

    Raises:
        UsageError: several images, or a text that is no path.
        UnreadableImage: damaged base64 text.
    """
    cell = _only_one(cell, name)
    if not isinstance(cell, str):
        return cell
    _check_text(cell, name)
    if _is_base64(cell):
        return _decoded(cell, name)
    return place.file(cell) if cell else None


def find_images(place: Place, cells: Sequence[Any], column: str, source: str) -> Place:
    """Where the files of a column are, found by its first cells; see `locate`.

    Raises:
        UsageError: a text is no path, or none of the files is there and it is clear why.
    """
    first = cells[:CELLS_TRIED]
    check_cells(first, column, source)
    tried = [text for cell in first if (text := path_text(cell))]
    if not tried or any(map(place.has, tried)):
        return place
    texts = list(map(path_text, cells))
    found = locate(place, texts, tried, column, source)
    if not found and (packed := packed_place(place, texts)):
        place = packed
        found = locate(place, texts, tried, column, source) or by_names(place, texts, column, source)
    if not found:
        say_why(place, tried, column, source)
    return found or place


def are_files(place: Place, cells: Sequence[Any]) -> bool:
    """Whether the first cells of a column name different files, most of which are there, maybe with another ending."""
    texts = [path_text(cell) for cell in cells[:CELLS_TRIED]]
    if len(set(texts)) < len(texts):
        return False
    found = sum(bool(text) and place.file(text).is_file() for text in texts)
    if not found:
        stems = {path.stem for path in islice(place.folder.iterdir(), MOST_FILES)}
        found = sum(text in stems for text in texts)
    return 2 * found > len(texts)


def check_cells(cells: Sequence[Any], column: str, source: str) -> None:
    """Refuse the first cell of a column that has several images, or a text that is no path.

    Raises:
        UsageError: there is one.
    """
    for row, cell in enumerate(cells):
        if isinstance(cell, str) and "\n" in cell and not _is_base64(cell):
            raise UsageError(
                f"{source}: row {row + 1} of the column {column} has a line end in it ({brief(cell)}). "
                "Look for a quote in this row that should not be there."
            )
        if not (isinstance(cell, str) and len(cell) <= SURELY_SHORT and ":" not in cell):
            name = f"{source}: row {row + 1} of the column {column}"
            cell = _only_one(cell, name)
            if isinstance(cell, str):
                _check_text(cell, name)


def path_text(cell: Any) -> str:
    """The path in a cell as text; empty if it has none."""
    if isinstance(cell, list | tuple) and len(cell) == 1:
        cell = cell[0]
    if isinstance(cell, dict):
        cell = cell.get("path")
    return str(cell) if isinstance(cell, int) or (isinstance(cell, str) and not _is_base64(cell)) else ""


def names_of(cells: Sequence[Any]) -> list[str]:
    """What messages call the images of a column: their paths, or the numbers of their rows."""
    return [printable(path_text(cell)) or f"row {row + 1}" for row, cell in enumerate(cells)]


def _only_one(cell: Any, name: str) -> Any:
    """The one image of a cell: of a list its item, of a dict its bytes or path, and a number as text."""
    if isinstance(cell, list | tuple):
        if len(cell) > 1:
            raise UsageError(f"{name}: a list of {len(cell)} images. Expected one image in each row.")
        cell = cell[0] if cell else None
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, int | float):
        cell = str(cell) if cell == cell else None
    return cell


def _is_base64(text: str) -> bool:
    return len(text) > SURELY_SHORT and BASE64.match(text) is not None


def _decoded(text: str, name: str) -> bytes:
    """The bytes of an image that is written as base64 text or as a data URI."""
    head, _, content = text.partition(",") if text.startswith(DATA) else ("base64", "", text)
    if not head.endswith("base64"):
        raise UnreadableImage(f"{name}: a data URI that is not in base64")
    try:
        return base64.b64decode("".join(content.split()), validate=True)
    except ValueError as error:
        raise UnreadableImage(f"{name}: damaged base64 text ({str(error).lower()})") from error


def _check_text(text: str, name: str) -> None:
    if ADDRESS.match(text) and not is_of_label_studio(text):
        raise UsageError(
            f"{name}: a web address ({brief(text)}). "
            "Download the images, and write the paths of the files into the column."
        )
    if _is_base64(text):
        return
    if len(text) > LONGEST_NAME // 4 and any(
        len(os.fsencode(part)) > LONGEST_NAME for part in re.split(r"[\\/]", text)
    ):
        raise UsageError(
            f"{name}: a text of {len(text):,} characters. Expected the path of an image; "
            "another column may have them (--image-column)."
        )
