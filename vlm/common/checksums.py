"""Checksums of the files of a folder, so that a bit that flipped on a disk or on the way is noticed.

CRC-32 finds every error of up to 32 bits in a row, and misses one in 4 billion of the others. It is no protection
against somebody who changes a file on purpose.
"""

import zlib
from collections.abc import Mapping
from pathlib import Path

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
    """Write `CHECKSUMS` for the files of a folder; those of its subfolders are not in it.

    Args:
        known: checksums by name that need not be computed again.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != CHECKSUMS)
    write_json(folder / CHECKSUMS, {path.name: known.get(path.name) or checksum(path) for path in files})


def read_checksums(folder: Path) -> dict[str, str]:
    """Checksums by file name; none in a folder without `CHECKSUMS`, as of an earlier version.

    Raises:
        UsageError: the file cannot be read.
    """
    path = folder / CHECKSUMS
    if not path.exists():
        return {}
    cure = "Copy the folder again, or delete this file to use the folder without a check."
    values = read_json(path, cure)
    if not isinstance(values, dict) or not all(
        isinstance(value, str) and name == Path(name).name for name, value in values.items()
    ):
        raise UsageError(f"{path} is damaged: it does not name files with their checksums. {cure}")
    return values


def check_checksums(folder: Path, cure: str, movable: str = "") -> None:
    """Compare the files of a folder with its `CHECKSUMS`; a folder without them is not checked.

    Args:
        cure: what the user can do about a damaged file; the end of the message.
        movable: the file that may be missing, because it may lie elsewhere.

    Raises:
        UsageError: a file is missing or has another content.
    """
    for name, expected in read_checksums(folder).items():
        path = folder / name
        if name == movable and not path.exists():
            continue
        if not path.is_file():
            raise UsageError(f"{path} is missing: {CHECKSUMS} next to it names it. {cure}")
        try:
            found = checksum(path)
        except OSError as error:
            raise UsageError(f"{path} cannot be read ({reason(error)}). {cure}") from error
        if found != expected:
            raise UsageError(f"{path} is damaged: its checksum is {found}, and {CHECKSUMS} says {expected}. {cure}")
