"""What a program has made itself: datasets of the `datasets` library, pandas tables, and lists of pairs."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm.common import UsageError, listed
from vlm.config import Settings
from vlm.data.sources.asked_splits import choose_splits
from vlm.data.sources.library import to_source
from vlm.data.sources.rows import Source
from vlm.data.sources.tables import Table, source_of_tables

EXPECTED = (
    "Expected a Dataset or DatasetDict of the datasets library, a pandas DataFrame, a list of pairs (image, label), "
    "a dict with one of them for each split, or the name of a dataset as text."
)


def read_object(data: object, settings: Settings) -> Source:
    """Read a dataset that a program has made.

    Args:
        data: a `Dataset`, `DatasetDict`, pandas `DataFrame`, list of pairs (image, label), or a dict with some of the
            same kind by the name of the split. An image is what `open_image` takes, a label a text or a number.

    Raises:
        UsageError: it is none of them, or a column is missing.
    """
    import datasets

    whole = not isinstance(data, Mapping)
    splits: dict[str, Any] = {"train": data}
    if isinstance(data, Mapping):
        splits = {str(name): split for name, split in data.items()}
    shown = {name: "dataset" if whole else f"dataset[{name!r}]" for name in splits}
    of_library = [name for name, split in splits.items() if isinstance(split, datasets.Dataset)]
    if of_library and len(of_library) < len(splits):
        other = next(name for name in splits if name not in of_library)
        raise UsageError(
            f"{shown[of_library[0]]} is a Dataset and {shown[other]} a {type(splits[other]).__name__}. Expected all "
            "splits to be of the same kind."
        )
    if of_library:
        return to_source(splits, settings, "Dataset" if whole else "DatasetDict", Path())
    tables = {name: _to_table(split, shown[name]) for name, split in splits.items()}
    roles, others = choose_splits(tables, settings)
    if "train" not in roles:
        return Source(type(data).__name__, {}, {}, sorted(tables))
    chosen = {role: tables[name] for role, name in roles.items()}
    names = {role: shown[name] for role, name in roles.items()}
    return source_of_tables(chosen, names, dict.fromkeys(roles, Path()), roles, others, settings)


def _to_table(data: Any, name: str) -> Table:
    """A split as a table.

    Raises:
        UsageError: it is none, or it is empty.
    """
    import pandas

    if isinstance(data, pandas.DataFrame):
        if not data.columns.is_unique:
            raise UsageError(f"{name} has two columns of the same name. Expected one of each: {listed(data.columns)}.")
        table = Table("DataFrame", {str(column): _plain(data[column].tolist()) for column in data.columns})
    elif isinstance(data, list | tuple):
        for place, pair in enumerate(data):
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise UsageError(f"{name}[{place}] is of the type {type(pair).__name__}, and no pair. {EXPECTED}")
        images, labels = zip(*data, strict=True) if data else ((), ())
        table = Table("list of pairs", {"image": _plain(images), "label": _plain(labels)}, label="label")
    else:
        raise UsageError(f"{name} is of the type {type(data).__name__}. {EXPECTED}")
    if not len(table):
        raise UsageError(f"{name} is empty. {EXPECTED}")
    return table


def _plain(values: Any) -> list[Any]:
    """Cells as tables have them: paths as text, numbers of NumPy and torch as Python's, and a missing value of pandas
    as None."""
    import pandas

    return [None if value is pandas.NA else _plain_one(value) for value in values]


def _plain_one(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if getattr(value, "ndim", None) == 0 else value
