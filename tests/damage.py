"""What disks, copies and people do to files."""

import shutil
from pathlib import Path


def flip_bit(path: Path) -> None:
    """Change one bit in the last quarter of a file, such as in its weights."""
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 4
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    """Leave the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def make_folder(path: Path) -> None:
    """Put a folder in the place of a file."""
    path.unlink()
    path.mkdir()


def make_file(path: Path) -> None:
    """Put a file in the place of a folder."""
    shutil.rmtree(path)
    path.write_text("not a folder")


def delete(path: Path) -> None:
    path.unlink()


def other_type(path: Path) -> None:
    """Put another type of JSON value into a file."""
    path.write_text("[1, 2]")


def no_keys(path: Path) -> None:
    """Leave nothing of the JSON object in a file."""
    path.write_text("{}")


def nested(path: Path) -> None:
    """Put JSON into a file that is nested too deep to be read."""
    path.write_text("[" * 100_000)
