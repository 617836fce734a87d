"""Predictions as a Parquet file, with the columns of the CSV file. pyarrow comes with `datasets`."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from vlm.common import utf8_text

PARQUET = ".parquet"
ROWS_AT_ONCE = 10_000  # of a row group; no more are in memory
NUMBERS, TRUTHS = ("confidence", "error_bound"), ("abstained",)


def write_parquet(path: Path, rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str | None]) -> None:
    """Write rows to a file.

    Args:
        rows: by column; a column may be missing.
        columns: as `columns_of` has them.
    """
    import pyarrow
    from pyarrow import parquet

    def kind(column: str, class_name: str | None) -> Any:
        if class_name is not None or column in NUMBERS:
            return pyarrow.float64()
        return pyarrow.bool_() if column in TRUTHS else pyarrow.string()

    schema = pyarrow.schema([(column, kind(column, name)) for column, name in columns.items()])
    rest = iter(rows)
    with parquet.ParquetWriter(path, schema) as writer:
        while some := list(islice(rest, ROWS_AT_ONCE)):
            table = {column: [_cell(row.get(column)) for row in some] for column in columns}
            table |= {column: [bool(row.get(column)) for row in some] for column in TRUTHS if column in columns}
            writer.write_table(pyarrow.table(table, schema))


def _cell(value: Any) -> Any:
    return utf8_text(value) if isinstance(value, str) else value


def read_names(path: Path) -> Iterator[str]:
    """The column `path` of a file, a part of it at a time."""
    from pyarrow import parquet

    for some in parquet.ParquetFile(path).iter_batches(ROWS_AT_ONCE, columns=["path"]):
        yield from some.column(0).to_pylist()


def has_predictions(path: Path, columns: Iterable[str]) -> bool:
    """Whether a file is Parquet and begins with these columns."""
    import pyarrow
    from pyarrow import parquet

    first = list(columns)
    try:
        return parquet.read_schema(path).names[: len(first)] == first
    except (pyarrow.ArrowException, OSError):
        return False
