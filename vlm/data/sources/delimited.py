"""CSV files and their like as columns: the separator is found, quotes are respected, fields may be long."""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path

from vlm.common import UsageError, brief
from vlm.data.finding import is_image

CLOSE = "Close the quote there, or write quotes within a field twice."
SEPARATORS = ",;\t|"
SAID = re.compile(
    rb"(?:\xef\xbb\xbf)?\"?sep=([,;\t|])\"?\r?\n", re.IGNORECASE
)  # the first line, as Excel writes and reads it
SPACED = (".txt", ".dat")  # the files in which a space may be the separator
ROWS_LOOKED_AT = 20  # in which the separator is found
START = 65_536  # characters in which they are
ROWS_AT_ONCE = 10_000
LONGEST_FIELD = 2**31 - 1  # characters


def read_delimited(path: Path, content: bytes, header: bool) -> dict[str, list[str | None]]:
    """The columns of a table by name, each with a text for each row; None: an empty cell.

    Args:
        content: the file, in UTF-8.
        header: whether the first line has the names; otherwise they are column1, column2, ...

    Raises:
        UsageError: a first line that cannot be a header, a line with too many fields, a quote that is not closed.
    """
    file = io.TextIOWrapper(io.BytesIO(content), "utf-8-sig", newline="")
    said = SAID.match(content)
    separator = said[1].decode() if said else _separator(content, path)
    reader = csv.reader(file, delimiter=separator, skipinitialspace=True)
    try:
        with _long_fields():
            if said:
                next(reader)
            first = next(filter(None, reader), [])
            rows: Iterator[list[str]] = _same_width(reader, len(first), path)
            if header:
                names = [name.strip() for name in first]
                _check_header(path, names)
            else:
                names, rows = [f"column{i + 1}" for i in range(len(first))], chain([first] * bool(first), rows)
            columns: list[list[str | None]] = [[] for _ in names]
            last: list[str] = []
            while batch := list(islice(rows, ROWS_AT_ONCE)):
                same: dict[str, str] = {}  # equal texts are kept once
                for column, values in zip(columns, zip(*batch, strict=True), strict=True):
                    column.extend(same.setdefault(text, text) or None for text in map(str.strip, values))
                last = batch[-1]
    except csv.Error as error:
        raise UsageError(f"{path}, line {reader.line_num}: not CSV ({error}). {CLOSE}") from error
    if content.count(b'"') % 2 and (lines := sum(field.count("\n") for field in last)):
        raise UsageError(f"{path}, line {reader.line_num - lines}: a quote is not closed. {CLOSE}")
    return dict(zip(names, columns, strict=True))


def is_text_table(path: Path) -> bool:
    """Whether a text file is clearly a table: equally many fields in its first lines, and paths of images in one."""
    try:
        with path.open("rb") as file:
            start = file.read(START)
    except OSError:
        return False
    rows = _first_rows(start, _separator(start, path))
    return len({len(row) for row in rows}) == 1 and any(len(row) > 1 and any(map(_is_image, row)) for row in rows)


def _is_image(field: str) -> bool:
    return is_image(Path(field.strip()))


def _separator(content: bytes, path: Path) -> str:
    """The separator with which most of the first lines have as many fields as the header, of these the one with most
    fields; a space in a text file that has no other."""
    found = ","
    best: tuple[float, int] = (0, 1)
    for separator in SEPARATORS + " ":
        if separator == " " and (best[1] > 1 or path.suffix.lower() not in SPACED):
            continue
        widths = [len(row) for row in _first_rows(content[:START], separator)]
        if widths and widths[0] > 1 and (score := (widths.count(widths[0]) / len(widths), widths[0])) > best:
            best, found = score, separator
    return found


def _first_rows(start: bytes, separator: str) -> list[list[str]]:
    text = start.decode("utf-8-sig", errors="ignore")
    if len(start) == START and "\n" in text:
        text = text[: text.rindex("\n")]  # the last line may not be whole
    with _long_fields():
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
        return list(islice(filter(None, reader), ROWS_LOOKED_AT))


@contextmanager
def _long_fields() -> Iterator[None]:
    """Let fields be as long as an image in base64 is."""
    before = csv.field_size_limit(LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _same_width(reader: "csv._reader", width: int, path: Path) -> Iterator[list[str]]:  # type: ignore[name-defined]
    """The rows that are not empty, each with as many fields as the first one."""
    for row in reader:
        if len(row) != width:
            if any(field.strip() for field in row[width:]):
                raise UsageError(
                    f"{path}, line {reader.line_num}: more fields than the header has. "
                    "Put quotes around fields that contain separators."
                )
            if not row:
                continue
            row = (row + [""] * width)[:width]
        yield row


def _check_header(path: Path, names: Sequence[str]) -> None:
    """Refuse a first line that cannot be a header: two equal names, or the path of an image."""
    if data := [name for name in names if _is_image(name)]:
        raise UsageError(
            f"{path}: the first line is data ({brief(data[0])}), not a header. "
            "Add --no-header: the columns are then called column1, column2, ..."
        )
    if repeated := [name for name in names if name and names.count(name) > 1]:
        raise UsageError(f"{path}: several columns are called {brief(repeated[0])}. Give each column its own name.")
