"""Which kind of source a name is: the demo, a folder, a table, or a dataset on the hub."""

from pathlib import Path
from typing import Any

import numpy as np

from vlm.common import UsageError
from vlm.config import IN_MEMORY, Settings
from vlm.data.hub import looks_like_path
from vlm.data.sources.archives import is_archive
from vlm.data.sources.asked_splits import take_parts
from vlm.data.sources.folders import read_archive, read_folder
from vlm.data.sources.foreign import refuse_file
from vlm.data.sources.hub import read_hub
from vlm.data.sources.library import ENDINGS, read_data_files
from vlm.data.sources.objects import read_object
from vlm.data.sources.places import find_file
from vlm.data.sources.rows import EXPECTED, Rows, Source
from vlm.data.sources.shards import is_shard, read_shards
from vlm.data.sources.streamed import read_stream
from vlm.data.sources.tables import is_table, read_tables

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def read_source(settings: Settings, data: object = None) -> Source:
    """Read the dataset that the settings name, or the splits of it that they ask for.

    Args:
        data: the dataset itself, if a program has made it.

    Raises:
        UsageError: there is no such dataset, or its layout or columns are not understood.
        RunError: the hub fails, or a download broke off.
    """
    return take_parts(_read(settings, data), settings)


def _read(settings: Settings, data: object) -> Source:
    name = settings.dataset
    if data is not None:
        return read_object(data, settings)
    if name == IN_MEMORY:
        raise UsageError(
            f"--dataset {IN_MEMORY}: the run was started by a program with a dataset of its own. Continue it with "
            "train(dataset=..., resume=True, output_dir=...)."
        )
    if settings.demo or name is None:
        return _read_digits()
    path = find_file(Path(), str(Path(name).expanduser()))
    if settings.streaming:
        return _streamed(path, name, settings)
    if path.is_dir():
        return read_folder(path, settings)
    if path.is_file():
        return _read_file(path, settings)
    if looks_like_path(name) or is_table(path):
        windows = " It is a Windows path; here / stands between folders." if "\\" in name else ""
        raise UsageError(f"--dataset {name}: no such file or folder.{windows} {EXPECTED}")
    return read_hub(name, settings)


def _read_file(path: Path, settings: Settings) -> Source:
    if path.suffix.lower() in ENDINGS:
        return read_data_files({"train": [path]}, path.parent, settings)
    if is_shard(path):
        return read_shards([path], settings)
    if is_archive(path):
        return read_archive(path, settings)
    if not is_table(path):
        refuse_file(path, EXPECTED)
    return read_tables({"train": path}, [], settings)


def _streamed(path: Path, name: str, settings: Settings) -> Source:
    if path.is_dir():
        return read_stream(settings, str(path), "folder")
    if path.exists() or looks_like_path(name):
        found = "a file" if path.exists() else "no such folder"
        raise UsageError(f"--dataset {name}: {found}. --streaming reads a dataset on the hub, or a folder of shards.")
    return read_hub(name, settings)


def _read_digits() -> Source:
    from sklearn.datasets import load_digits

    digits: Any = load_digits()  # the library does not declare its fields
    images = (digits.images * (255 / 16)).round().astype(np.uint8)  # (N, 8, 8): 0..16 -> 0..255
    rows = Rows(images, digits.target.tolist(), [f"digit {i}" for i in range(len(images))])
    return Source("scikit-learn's handwritten digits", {"train": rows}, {"train": "train"}, class_names=list(DIGITS))
