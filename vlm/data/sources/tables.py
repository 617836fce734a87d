"""CSV, TSV and JSONL files with the paths and labels of images. Paths are relative to the file."""

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path

from vlm.common import UsageError, brief, first_line, printable
from vlm.config import Settings
from vlm.data.finding import is_image
from vlm.data.sources.cells import check_files, image_of, path_text
from vlm.data.sources.columns import Columns, choose_columns, missing_column, reasoning_texts
from vlm.data.sources.foreign import SAVE_AS_CSV, refuse_by_content
from vlm.data.sources.rows import Rows, Source
from vlm.data.sources.split_column import use_split_column

CSV = (".csv", ".tsv")
JSONL = (".jsonl", ".ndjson")
ROWS_WITH_COLUMNS = 1000  # the rows of a table in which columns are looked for
ONE_OBJECT = 'Expected one object in each line, such as {"image": "a.png", "label": "cat"}.'

Table = list[dict[str, object]]


def is_table(path: Path) -> bool:
    """Whether a file is a table by its ending."""
    return path.suffix.lower() in CSV + JSONL


def find_tables(folder: Path) -> dict[str, Path]:
    """The tables directly in a folder, by name without ending. A table called metadata belongs to an image folder."""
    return {path.stem: path for path in sorted(folder.iterdir()) if is_table(path) and path.stem != "metadata"}


def read_tables(paths: dict[str, Path], others: list[str], settings: Settings) -> Source:
    """Read one table for each split.

    Args:
        paths: the tables by role.
        others: the names of further tables, which are not read.

    Raises:
        UsageError: a table is empty or damaged, or a column is missing.
    """
    tables = {role: _read_table(path) for role, path in paths.items()}
    for role, table in tables.items():
        if not table:
            raise UsageError(f"{paths[role]}: no rows. Expected a header (CSV) and one line for each image.")
    names = _column_names(tables.values())
    columns = choose_columns(settings, names, values=lambda name: _values(tables["train"][:ROWS_WITH_COLUMNS], name))
    for role, table in tables.items():
        if columns.image not in (there := _column_names([table])):
            raise missing_column(columns.image, paths[role].name, there)
    splits = {role: _rows(table, paths[role], columns) for role, table in tables.items()}
    kind = "CSV file" if all(map(_is_csv, paths.values())) else "JSONL file"
    split_names = {role: path.name for role, path in paths.items()}
    rest = [name for name in names if name not in columns.used]
    unused = {role: {name: _values(table, name) for name in rest} for role, table in tables.items()}
    return use_split_column(Source(kind, splits, split_names, others, columns=columns), unused)


def _is_csv(path: Path) -> bool:
    return path.suffix.lower() in CSV


def _column_names(tables: Iterable[Table]) -> list[str]:
    """The columns of all tables, in the order in which they are found."""
    return list(dict.fromkeys(column for table in tables for row in table[:ROWS_WITH_COLUMNS] for column in row))


def _values(table: Table, column: str) -> list[object]:
    return [row.get(column) for row in table]


def _rows(table: Table, path: Path, columns: Columns) -> Rows:
    cells = _values(table, columns.image)
    check_files(cells, path.parent, columns.image, str(path))
    images = [
        image_of(cell, path.parent, f"{path}: row {i + 1} of the column {columns.image}")
        for i, cell in enumerate(cells)
    ]
    names = [printable(path_text(cell)) or f"row {i + 1}" for i, cell in enumerate(cells)]
    texts = reasoning_texts(_values(table, columns.reasoning), names) if columns.reasoning else None
    return Rows(images, _values(table, columns.label), names, texts)


def _read_table(path: Path) -> Table:
    refuse_by_content(path)
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}, line {line}: not a readable text file in UTF-8. {SAVE_AS_CSV}") from error
    if "\0" in text:
        raise UsageError(f"{path}: not a text file in UTF-8: it has characters of value 0. {SAVE_AS_CSV}")
    return _read_csv(path, text) if _is_csv(path) else _read_jsonl(path, text)


def _read_csv(path: Path, text: str) -> Table:
    """The rows of a table with a header, separated by commas, semicolons or tabs."""
    header = text.split("\n", 1)[0]
    separator = max(",;\t", key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    rows: Table = []
    try:
        _check_header(path, [name.strip() for name in reader.fieldnames or []])
        for row in reader:
            if None in row:
                raise UsageError(
                    f"{path}, line {reader.line_num}: more fields than the header has. "
                    "Put quotes around fields that contain separators."
                )
            rows.append({name.strip(): value.strip() if value else None for name, value in row.items()})
    except csv.Error as error:
        raise UsageError(
            f"{path}, line {reader.line_num}: not CSV ({error}). "
            "Look for a quote that is not closed before it, or for images as base64 text, which are not read."
        ) from error
    return rows


def _check_header(path: Path, names: list[str]) -> None:
    """Refuse a first line that cannot be a header: two equal names, or the path of an image."""
    if repeated := [name for name in names if name and names.count(name) > 1]:
        raise UsageError(f"{path}: several columns are called {brief(repeated[0])}. Give each column its own name.")
    if data := [name for name in names if is_image(Path(name))]:
        raise UsageError(
            f"{path}: the first line is data ({brief(data[0])}), not a header. "
            "Add a first line with the names of the columns, such as image,label."
        )


def _read_jsonl(path: Path, text: str) -> Table:
    """The objects of a file that has one in each line; empty lines are skipped."""
    rows: Table = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except RecursionError as error:
            raise UsageError(f"{path}, line {number}: JSON that is nested too deep. {ONE_OBJECT}") from error
        except ValueError as error:
            raise UsageError(f"{path}, line {number}: not JSON ({first_line(error)}). {ONE_OBJECT}") from error
        if not isinstance(row, dict):
            raise UsageError(f"{path}, line {number}: no JSON object. {ONE_OBJECT}")
        rows.append(row)
    return rows
