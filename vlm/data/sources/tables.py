"""CSV, TSV and JSONL files with the paths and labels of images. Paths are relative to the file."""

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path

from vlm.common.errors import UsageError, reason
from vlm.config import Settings
from vlm.data.sources.columns import Columns, choose_columns, reasoning_texts
from vlm.data.sources.rows import Rows, Source

CSV = (".csv", ".tsv")
JSONL = (".jsonl", ".ndjson")
ROWS_WITH_COLUMNS = 1000  # the rows of a table in which columns are looked for

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
    columns = choose_columns(settings, _column_names(tables.values()))
    splits = {role: _rows(table, paths[role].parent, columns) for role, table in tables.items()}
    kind = "CSV file" if all(map(_is_csv, paths.values())) else "JSONL file"
    split_names = {role: path.name for role, path in paths.items()}
    return Source(kind, splits, split_names, others, columns=columns)


def _is_csv(path: Path) -> bool:
    return path.suffix.lower() in CSV


def _column_names(tables: Iterable[Table]) -> list[str]:
    """The columns of all tables, in the order in which they are found."""
    return list(dict.fromkeys(column for table in tables for row in table[:ROWS_WITH_COLUMNS] for column in row))


def _rows(table: Table, folder: Path, columns: Columns) -> Rows:
    paths = [str(row.get(columns.image) or "") for row in table]
    images = [folder / path if path else None for path in paths]
    names = [path or f"row {i + 1}" for i, path in enumerate(paths)]
    texts = None
    if columns.reasoning:
        texts = reasoning_texts([row.get(columns.reasoning) for row in table], names)
    return Rows(images, [row.get(columns.label) for row in table], names, texts)


def _read_table(path: Path) -> Table:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a readable text file in UTF-8 ({reason(error)}).") from error
    return _read_csv(path, text) if _is_csv(path) else _read_jsonl(path, text)


def _read_csv(path: Path, text: str) -> Table:
    """The rows of a table with a header, separated by commas, semicolons or tabs."""
    header = text.split("\n", 1)[0]
    separator = max(",;\t", key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    rows: Table = []
    try:
        for row in reader:
            if None in row:
                raise UsageError(
                    f"{path}, line {reader.line_num}: more fields than the header has. "
                    "Put quotes around fields that contain separators."
                )
            rows.append({name.strip(): value.strip() if value else None for name, value in row.items()})
    except csv.Error as error:
        raise UsageError(f"{path}, line {reader.line_num}: not CSV ({error}).") from error
    return rows


def _read_jsonl(path: Path, text: str) -> Table:
    """The objects of a file that has one in each line; empty lines are skipped."""
    rows: Table = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{path}, line {number}: not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise UsageError(f'{path}, line {number}: expected an object such as {{"image": "a.png", "label": "cat"}}.')
        rows.append(row)
    return rows
