"""Checksums of the files of a folder, so that a bit that flipped on a disk or on the way is noticed.

CRC-32 finds every error of up to 32 bits in a row, and misses one in 4 billion of the others. It is no protection
against somebody who changes a file on purpose.
"""

import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from vlm.common.errors import UsageError, reason
from vlm.common.files import read_json, write_json

CHECKSUMS = "checksums.json"
CHUNK = 1 << 20  # bytes that are read at once


def checksum(path: Path) -> str:
    """The CRC-32 of a file's content, such as crc32:0a1b2c3d."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return f"crc32:{value:08x}"


def write_checksums(folder: Path, known: Mapping[str, str]) -> None:
    """Write `CHECKSUMS` for the files of a folder and its subfolders.

    Args:
        known: checksums by name that need not be computed again.
    """
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files.pop(CHECKSUMS, None)
    write_json(folder / CHECKSUMS, {name: known.get(name) or checksum(path) for name, path in files.items()})


def read_checksums(folder: Path) -> dict[str, str]:
    """Checksums by path in the folder, such as adapter/adapter_config.json; none without `CHECKSUMS`.

    Raises:
        UsageError: the file cannot be read.
    """
    path = folder / CHECKSUMS
    if not path.exists():
        return {}
    cure = "Copy the folder again, or delete this file to use the folder without a check."
    values = read_json(path, cure)
    if not isinstance(values, dict) or not all(
        isinstance(value, str) and _lies_inside(name) for name, value in values.items()
    ):
        raise UsageError(f"{path} is damaged: it does not name files with their checksums. {cure}")
    return values


def _lies_inside(name: str) -> bool:
    """Whether a text is the path of something in a folder."""
    path = PurePosixPath(name)
    return name == str(path) != "." and not path.is_absolute() and ".." not in path.parts and "\\" not in name


def check_checksums(folder: Path, cure: str, movable: str = "", editable: str = "") -> None:
    """Compare the files of a folder with its `CHECKSUMS`; a folder without them is not checked.

    A subfolder may be left out as a whole.

    Args:
        cure: what the user can do about a damaged file; the end of the message.
        movable: the file that may be missing, because it may lie elsewhere.
        editable: the file that may be missing or have another content, because it is for people.

    Raises:
        UsageError: a file is missing or has another content.
    """
    for name, expected in read_checksums(folder).items():
        path = folder / name
        part = folder / PurePosixPath(name).parts[0]  # the file itself, or the subfolder that it is in
        if name == editable or (name == movable or part != path) and not part.exists():
            continue
        if not path.is_file():
            raise UsageError(f"{path} is missing: {CHECKSUMS} next to it names it. {cure}")
        try:
            found = checksum(path)
        except OSError as error:
            raise UsageError(f"{path} cannot be read ({reason(error)}). {cure}") from error
        if found != expected:
            raise UsageError(f"{path} is damaged: its checksum is {found}, and {CHECKSUMS} says {expected}. {cure}")
