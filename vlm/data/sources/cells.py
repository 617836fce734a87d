"""A cell of an image column -> what `open_image` takes, or in two lines why it is none."""

import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from vlm.common import UsageError, brief
from vlm.data.finding import is_image
from vlm.data.images import ImageSource

LONGEST_NAME = 255  # bytes of the name of a file on every usual system
CELLS_TRIED = 100  # the files of these are looked for before anything is decoded
MOST_FILES = 100_000  # that are looked through for files of other cells
# How JPEG, PNG, GIF, WebP, BMP and TIFF files begin if they are written as base64 text.
BASE64 = re.compile(r"data:image/|(/9j/|iVBORw0KGgo|R0lGOD|UklGR|Qk|SUkq|TU0A)[A-Za-z0-9+/=\s]{100}")
ADDRESS = re.compile(r"(https?|ftp|s3|gs)://", re.IGNORECASE)


def image_of(cell: Any, folder: Path, place: str) -> ImageSource | None:
    """What `open_image` takes, or None if the cell has no image.

    Args:
        cell: a path, the bytes of an image, a decoded image, a list with one of them, or a dict with "bytes" or "path".
        folder: what paths are relative to.
        place: which cell it is, for messages.

    Raises:
        UsageError: several images, or a text that is no path.
    """
    if isinstance(cell, list | tuple):
        if len(cell) > 1:
            raise UsageError(f"{place}: a list of {len(cell)} images. Expected one image in each row.")
        cell = cell[0] if cell else None
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, int | float):
        cell = str(cell) if cell == cell else None
    if not isinstance(cell, str):
        return cell
    _check_text(cell, place)
    return find_file(folder, cell) if cell else None


def path_text(cell: Any) -> str:
    """The path in a cell as text; empty if it has none."""
    if isinstance(cell, list | tuple) and len(cell) == 1:
        cell = cell[0]
    if isinstance(cell, dict):
        cell = cell.get("path")
    return str(cell) if isinstance(cell, str | int) else ""


def find_file(folder: Path, text: str) -> Path:
    """The file that a text names. If there is none: with / for \\, and in the other Unicode normal forms.

    macOS writes accents of file names as characters of their own, and tables rarely do.
    """
    path = folder / text
    if (text.isascii() and "\\" not in text) or os.path.exists(path):
        return path
    slashed = (text, text.replace("\\", "/"))
    spelled = [unicodedata.normalize(form, other) for other in slashed for form in ("NFC", "NFD")]
    return next((folder / other for other in spelled if os.path.exists(folder / other)), path)


def check_files(cells: Sequence[Any], folder: Path, column: str, source: str) -> None:
    """Refuse a column if its first cells are no paths, or if none of their files is there and it is clear why.

    Args:
        folder: what paths are relative to.
        source: what the column belongs to, for messages.

    Raises:
        UsageError: a text is no path, the files are in another folder or have an ending, or the paths are of Windows.
    """
    for i, cell in enumerate(cells[:CELLS_TRIED]):
        image_of(cell, folder, f"{source}: row {i + 1} of the column {column}")
    texts = [text for cell in cells[:CELLS_TRIED] if (text := path_text(cell))]
    if not texts or any(os.path.exists(find_file(folder, text)) for text in texts):
        return
    text = texts[0].replace("\\", "/")
    place = f"{source}: no file {brief(texts[0])} of the column {column} in {folder or Path.cwd()}"
    for file in _image_files(folder):
        shown = brief(file.relative_to(folder).as_posix())
        if file.name == PurePosixPath(text).name:
            raise UsageError(f"{place}, but there is {shown}. Write paths like this one into the column.")
        if file.stem == PurePosixPath(text).name:
            raise UsageError(
                f"{place}: the column has names without an ending, and there is {shown}. "
                "Write paths like this one into the column."
            )
    if text != texts[0]:
        raise UsageError(f"{place}: it is a Windows path. Write paths relative to that folder, with / for \\.")


def _image_files(folder: Path) -> Iterator[Path]:
    files = (Path(place, name) for place, _, names in os.walk(folder) for name in sorted(names))
    return filter(is_image, islice(files, MOST_FILES))


def _check_text(text: str, place: str) -> None:
    if BASE64.match(text):
        raise UsageError(
            f"{place}: an image as base64 text. Write the images into files, and their paths into the column."
        )
    if ADDRESS.match(text):
        raise UsageError(
            f"{place}: a web address ({brief(text)}). "
            "Download the images, and write the paths of the files into the column."
        )
    if len(text) > LONGEST_NAME // 4 and any(
        len(os.fsencode(part)) > LONGEST_NAME for part in re.split(r"[\\/]", text)
    ):
        raise UsageError(
            f"{place}: a text of {len(text):,} characters. Expected the path of an image; "
            "another column may have them (--image-column)."
        )
