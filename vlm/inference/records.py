"""Rows of predictions, read back from a file that may end in the middle of one."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from vlm.common import UsageError, brief, csv_cell, utf8_text

END_OF_CSV = b"\r\n"
CUT_OFF = "unexpected end of data"  # what `csv` says if a file ends within a text
AGAIN = "Start again without --resume."


class Record(NamedTuple):
    """A row of a file.

    raw: as it stands there, with its end; name: its path as it stands there; values: by column, texts in CSV.
    """

    raw: bytes
    name: str
    values: Mapping[str, Any]


@dataclass
class Tally:
    """What is known of the rows so far: how many, how many have an error, and the first one of these."""

    rows: int = 0
    failed: int = 0
    first: str = ""

    def add(self, name: str, failed: bool) -> None:
        """Count a row."""
        self.rows += 1
        if failed:
            self.failed += 1
            self.first = self.first or name


class Begun(NamedTuple):
    """A file that an earlier run has begun: its whole rows, and their bytes with the header."""

    part: Path
    tally: Tally
    size: int


def as_stored(name: str, header: bytes) -> str:
    """A name as it is read from a file that has one: in CSV, formulas have an apostrophe, and surrogates an escape."""
    return utf8_text(csv_cell(name)) if header else name


def read_records(path: Path, header: bytes) -> Iterator[Record]:
    """The whole rows of a file; the last one, if it was cut off, is left out.

    Args:
        header: the first line of a CSV file; empty for JSON lines.

    Raises:
        UsageError: the file has other columns, or a damaged row.
    """
    with path.open("rb") as file:
        start = file.read(len(header))
        if start == header:
            yield from _csv_records(path, file, header) if header else _json_records(path, file)
        elif not header.startswith(start):
            raise UsageError(f"{path} has other columns than this command writes. {AGAIN}")


def _json_records(path: Path, file: BinaryIO) -> Iterator[Record]:
    for number, line in enumerate(file, 1):
        if not line.endswith(b"\n"):
            return
        try:
            values = json.loads(line)
            yield Record(line, values["path"], values)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UsageError(f"{path}: line {number} is damaged. {AGAIN}") from error


def _csv_records(path: Path, file: BinaryIO, header: bytes) -> Iterator[Record]:
    columns = next(csv.reader([header.decode()]))
    raw: list[bytes] = []  # the lines of the row that is read: texts in it may have line ends

    def lines() -> Iterator[str]:
        for line in file:
            raw.append(line)
            yield line.decode("utf-8", "replace")  # a row may be cut off within a character

    try:
        for cells in csv.reader(lines(), strict=True):
            if not raw[-1].endswith(END_OF_CSV):
                return
            if len(cells) != len(columns):
                raise UsageError(f"{path}: the row of {brief(cells[0] if cells else '')} is damaged. {AGAIN}")
            yield Record(b"".join(raw), cells[0], dict(zip(columns, cells, strict=True)))
            raw.clear()
    except csv.Error as error:
        if str(error) != CUT_OFF:
            raise UsageError(f"{path} is damaged ({error}). {AGAIN}") from error


def read_begun(part: Path, header: bytes, names: Iterable[str]) -> Begun:
    """What a file has already, compared with what it is to have.

    Args:
        names: those of all images that belong into the file, in order; no more are taken than it has rows.

    Raises:
        UsageError: its rows are those of other images, or damaged.
    """
    tally, size = Tally(), 0
    with part.open("rb") as file:
        size = len(header) if file.read(len(header)) == header else 0
    rest = iter(names)
    for record in read_records(part, header):
        name = next(rest, None)
        check_name(record, name, header, tally.rows + 1, part)
        tally.add(record.name, bool(record.values.get("error")))
        size += len(record.raw)
    return Begun(part, tally, size)


def check_name(record: Record, name: str | None, header: bytes, number: int, path: Path) -> None:
    """Check that a row is that of an image.

    Raises:
        UsageError: it is another one's.
    """
    if name is None or record.name != as_stored(name, header):
        now = "there are only so many images" if name is None else f"image {number} is {brief(name)}"
        raise UsageError(
            f"{path}: row {number} is that of {brief(record.name)}, but now {now}. Give the same images in the same "
            f"order, or start again without --resume."
        )


def merge(paths: list[Path], header: bytes, names: Iterable[str]) -> Iterator[Record]:
    """The rows of files among which images were dealt out in turn, in the order of the images.

    Raises:
        UsageError: they are those of other images, as these have changed.
    """
    readers = [read_records(path, header) for path in paths]
    for number, name in enumerate(names):
        path = paths[number % len(paths)]
        record = next(readers[number % len(paths)], None)
        if record is None:
            raise UsageError(f"{path} has no row of {brief(name)}: the images have changed meanwhile. {AGAIN}")
        check_name(record, name, header, number + 1, path)
        yield record
