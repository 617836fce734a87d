"""Tables with the paths and labels of images: CSV and its like, JSONL, JSON. Paths are relative to the file.

A table is kept as columns: a text for each cell, and none that is kept twice in a row of cells.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from vlm.common import UsageError, first_line, note
from vlm.config import Settings
from vlm.data.finding import is_hidden, is_image
from vlm.data.sources.cells import Cells, are_files, check_cells, find_images, names_of
from vlm.data.sources.columns import Columns, choose_columns, missing_column, reasoning_texts, usual_labels
from vlm.data.sources.delimited import is_text_table, read_delimited
from vlm.data.sources.exports import (
    ABOUT_ANNOTATIONS,
    LABEL_STUDIO,
    Export,
    choices_of,
    is_export,
    load_json,
    read_export,
)
from vlm.data.sources.foreign import SAVE_AS_CSV, refuse_by_content
from vlm.data.sources.groups import group_names
from vlm.data.sources.labels import one_hot_labels, text_column, use_names
from vlm.data.sources.places import Place, asked_place, is_of_label_studio
from vlm.data.sources.roles import sort_splits
from vlm.data.sources.rows import Rows, Source
from vlm.data.sources.split_column import use_split_column

CSV = (".csv", ".tsv")
TEXT = (".txt", ".dat", ".tab", ".psv")  # tables only if their content clearly is one
JSONL = (".jsonl", ".ndjson")
JSON = (".json",)
OF_THE_LIBRARY = ("metadata",)  # a table of this name belongs to an image folder
ONE_OBJECT = 'Expected one object in each line, such as {"image": "a.png", "label": "cat"}.'
ROWS_AT_ONCE = 10_000


@dataclass
class Table:
    """kind: in words; columns: the values of each row by the name of the column; label: the column of the labels, if
    the layout of the file says which."""

    kind: str
    columns: dict[str, list[Any]] = field(default_factory=dict)
    label: str | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def values(self, column: str) -> Sequence[Any]:
        """The values of a column; None for each row, if there is no such column."""
        return self.columns[column] if column in self.columns else [None] * len(self)


def is_table(path: Path) -> bool:
    """Whether a file is a table by its ending, or a text file that clearly is one."""
    ending = path.suffix.lower()
    return ending in CSV + JSONL + JSON or (ending in TEXT and path.is_file() and is_text_table(path))


def find_tables(folder: Path) -> dict[str, Path]:
    """The tables directly in a folder, by name without ending: CSV and JSONL files or, if there are none, JSON files of
    a layout that is read. A table called metadata belongs to an image folder."""
    files = [path for path in sorted(folder.iterdir()) if path.stem not in OF_THE_LIBRARY]
    found = [path for path in files if path.suffix.lower() in CSV + JSONL]
    return {path.stem: path for path in found or filter(_is_export_file, files)}


def find_split_tables(folder: Path, settings: Settings) -> tuple[dict[str, Path], list[str]]:
    """The tables of splits that have a folder each, such as train/labels.json or valid/_classes.csv.

    Returns:
        The tables by role; empty if the folder of train has not exactly one table, or has folders of classes. If no
        train is there and none is needed, the first split takes its place.
        The names of folders that have no role.
    """
    found = [path for path in sorted(folder.iterdir()) if path.is_dir() and not is_hidden(path.name)]
    folders = {path.name: path for path in found if os.access(path, os.R_OK | os.X_OK)}
    roles, others = sort_splits(folders)
    tables = {role: list(find_tables(folders[name]).values()) for role, name in roles.items()}
    main = "train" if settings.labels_needed or "train" in roles else next(iter(roles), "train")
    if len(tables.get(main, ())) != 1 or sum(path.is_dir() for path in folders[roles[main]].iterdir()) > 1:
        return {}, []
    return {role: paths[0] for role, paths in tables.items() if len(paths) == 1}, others


def read_tables(paths: dict[str, Path], others: list[str], settings: Settings) -> Source:
    """Read one table for each split.

    Args:
        paths: the tables by role.
        others: the names of further tables, which are not read.

    Raises:
        UsageError: a table is empty or damaged, or a column is missing.
    """
    tables = {role: _read_table(path, not settings.no_header) for role, path in paths.items()}
    for role, table in tables.items():
        if not len(table):
            raise UsageError(f"{paths[role]}: no rows. Expected a header (CSV) and one line for each image.")
    # Two files of the same name in folders of splits are told apart by the folder.
    same = len({path.name for path in paths.values()}) < len(paths)
    split_names = {role: f"{path.parent.name}/{path.name}" if same else path.name for role, path in paths.items()}
    names = {role: str(path) for role, path in paths.items()}
    folders = {role: path.parent for role, path in paths.items()}
    return source_of_tables(tables, names, folders, split_names, others, settings)


def source_of_tables(
    tables: Mapping[str, Table],
    shown: Mapping[str, str],
    folders: Mapping[str, Path],
    split_names: dict[str, str],
    others: list[str],
    settings: Settings,
) -> Source:
    """The rows of one table for each split. The train split decides the columns.

    Args:
        tables, split_names: by role.
        shown: by role, what messages call the table.
        folders: by role, what paths of images are relative to.
        others: the names of further tables, which are not read.

    Raises:
        UsageError: a column is missing.
    """
    names = list(dict.fromkeys(name for table in tables.values() for name in table.columns))
    train = tables["train"] if "train" in tables else next(iter(tables.values()))  # none is needed to classify
    names_files = None
    if settings.image_folder or settings.image_suffix:
        names_files = partial(are_files, asked_place(settings, next(iter(folders.values()))))
    classes = [train.label] if train.label else ()
    columns = choose_columns(settings, names, (), classes, values=train.values, names_files=names_files)
    for role, table in tables.items():
        if columns.image not in table.columns:
            raise missing_column(columns.image, split_names[role], table.columns)
        if not columns.one_hot and columns.label not in table.columns:
            _use_other_label(table, columns, train, split_names[role])
    splits = {
        role: _rows(table, shown[role], columns, asked_place(settings, folders[role])) for role, table in tables.items()
    }
    rest = [name for name in names if name not in columns.used]
    unused = {role: {name: table.values(name) for name in rest} for role, table in tables.items()}
    source = Source(train.kind, splits, split_names, others, columns=columns)
    if text := text_column(columns.label, rest):
        labels = {role: rows.labels for role, rows in splits.items()}
        texts = {role: table.values(text) for role, table in tables.items()}
        source.name_labels(use_names(labels, texts, columns.label, text))
    return use_split_column(source, unused)


def _use_other_label(table: Table, columns: Columns, train: Table, name: str) -> None:
    """Take the labels of a split from a column of another usual name, if they are classes of train. A note says so."""
    known = set(map(str, train.values(columns.label)))
    for other in usual_labels(name for name in table.columns if name not in columns.used):
        if not known.isdisjoint(map(str, table.values(other))):
            note(f"note: {name} has no column {columns.label}: its labels are those of the column {other}.")
            table.columns[columns.label] = table.columns.pop(other)
            return


def _rows(table: Table, path: str, columns: Columns, place: Place) -> Rows:
    cells = table.values(columns.image)
    place = find_images(place, cells, columns.image, path)
    check_cells(cells, columns.image, path)
    names = names_of(cells)
    texts = reasoning_texts(table.values(columns.reasoning), names) if columns.reasoning else None
    if columns.one_hot:
        labels: Sequence[Any] = one_hot_labels({name: table.values(name) for name in columns.one_hot}, names, path)
    else:
        labels = table.values(columns.label)
    groups = group_names(table.values(columns.group), path) if columns.group else None
    return Rows(Cells(cells, place, path, columns.image), labels, names, texts, groups)


def _read_table(path: Path, header: bool) -> Table:
    refuse_by_content(path)
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}, line {line}: not a readable text file in UTF-8. {SAVE_AS_CSV}") from error
    if "\0" in text:
        raise UsageError(f"{path}: not a text file in UTF-8: it has characters of value 0. {SAVE_AS_CSV}")
    ending = path.suffix.lower()
    if ending in CSV + TEXT:
        del text
        return _of_label_studio(Table("CSV file", dict(read_delimited(path, content, header))))
    if ending in JSON and (export := _read_json(path, text)):
        return _of_label_studio(Table(export.kind, _to_columns(export.rows), export.label))
    return Table("JSONL file", _to_columns(_json_lines(path, text)))


def _of_label_studio(table: Table) -> Table:
    """The table itself or, if it is one row for each annotation of Label Studio, with its choices as labels."""
    if not {"annotation_id", "lead_time"} <= set(table.columns):
        return table
    table.kind = LABEL_STUDIO
    answers = {name: values for name, values in table.columns.items() if name not in ABOUT_ANNOTATIONS}
    answers = {name: list(map(choices_of, values)) for name, values in answers.items() if not _are_files(values)}
    table.columns |= answers
    table.label = next(iter(answers)) if len(answers) == 1 else None
    return table


def _are_files(values: Sequence[Any]) -> bool:
    texts = [value for value in values[:ROWS_AT_ONCE] if isinstance(value, str)]
    return bool(texts) and all(is_of_label_studio(text) or is_image(Path(text)) for text in texts)


def _read_json(path: Path, text: str) -> Export | None:
    """What a JSON file has; None if it has one object in each line."""
    try:
        return read_export(load_json(text), path)
    except RecursionError as error:
        raise UsageError(f"{path}: JSON that is nested too deep. {ONE_OBJECT}") from error
    except ValueError as error:
        if getattr(error, "msg", "") == "Extra data" and text.lstrip().startswith("{"):
            return None
        raise UsageError(
            f"{path}: not JSON ({first_line(error)}). It may be cut off: copy or download it again."
        ) from error


def _is_export_file(path: Path) -> bool:
    """Whether a file is JSON of a layout that is read."""
    if path.suffix.lower() not in JSON or not path.is_file():
        return False
    try:
        return is_export(json.loads(path.read_bytes()))
    except (OSError, ValueError, RecursionError):
        return False


def _to_columns(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Objects as columns by name; None where an object lacks one."""
    columns: dict[str, list[Any]] = {}
    count, rest = 0, iter(rows)
    while batch := list(islice(rest, ROWS_AT_ONCE)):
        same: dict[str, str] = {}  # equal texts are kept once
        for name in dict.fromkeys(name for row in batch for name in row):
            columns.setdefault(name, [None] * count)
        for name, values in columns.items():
            cells = (row.get(name) for row in batch)
            values.extend(same.setdefault(cell, cell) if isinstance(cell, str) else cell for cell in cells)
        count += len(batch)
    return columns


def _json_lines(path: Path, text: str) -> Iterator[dict[str, Any]]:
    """The objects of a file that has one in each line; empty lines are skipped."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = load_json(line)
        except RecursionError as error:
            raise UsageError(f"{path}, line {number}: JSON that is nested too deep. {ONE_OBJECT}") from error
        except ValueError as error:
            raise UsageError(f"{path}, line {number}: not JSON ({first_line(error)}). {ONE_OBJECT}") from error
        if not isinstance(row, dict):
            raise UsageError(f"{path}, line {number}: no JSON object. {ONE_OBJECT}")
        yield row
