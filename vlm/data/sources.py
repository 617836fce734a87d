"""Any labeled source of images -> rows of (image, label) by split. Nothing is decoded here, and labels stay as they
are."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlm.common.errors import UsageError, did_you_mean, reason
from vlm.config import Settings, reasoning_of
from vlm.data.hub import check_dataset_reachable, looks_like_path
from vlm.data.images import is_image, visible_files

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing", "eval"),
}
IMAGE_COLUMNS = ("image", "img", "picture", "photo", "pixel_values", "file", "file_name", "filename", "path", "image_path", "file_path",
                 "filepath", "image_file", "images", "pictures")  # fmt: skip
LABEL_COLUMNS = (
    "label",
    "labels",
    "class",
    "category",
    "target",
    "species",
    "class_name",
    "label_name",
    "fine_label",
    "y",
)
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson")
LIBRARY_ENDINGS = (".parquet", ".arrow")  # a folder with such files is left to the `datasets` library
LIBRARY_FILES = ("metadata.csv", "metadata.jsonl")
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
EXPECTED = (
    "Expected a hub id, a folder CLASS/IMAGE or SPLIT/CLASS/IMAGE, a CSV or JSONL file with paths and labels, "
    "or a folder written by save_to_disk."
)


@dataclass
class Rows:
    """The rows of one split: by index, what `open_image` takes, the label as it was found, and a name for messages.

    reasonings: a text about each image, or None for it, where a column of them was named.
    """

    images: Sequence[Any]
    labels: list[Any]
    names: list[str]
    reasonings: list[str | None] | None = None


@dataclass
class Source:
    """A dataset as read: `splits` by role (train, validation, test).

    `class_names` is there where the labels are indices into it; `others` are the splits that are left alone.
    """

    kind: str
    splits: dict[str, Rows]
    split_names: dict[str, str]
    others: list[str] = field(default_factory=list)
    class_names: list[str] | None = None
    image_column: str | None = None
    label_column: str | None = None
    reasoning_column: str | None = None
    commit: str | None = None


def read_source(settings: Settings) -> Source:
    """Read the dataset that the settings name.

    Raises:
        UsageError: there is none, its layout or columns are not understood, or it has no split to train on.
    """
    if settings.demo:
        return _read_digits()
    name = settings.dataset
    path = Path(name).expanduser()
    if path.is_dir():
        return _read_folder(path, settings)
    if path.is_file():
        if path.suffix.lower() not in TABLES:
            raise UsageError(f"--dataset {name}: a file of a kind that is not read. {EXPECTED}")
        return _read_tables({"train": path}, [], settings)
    if looks_like_path(name) or path.suffix.lower() in TABLES:
        raise UsageError(f"--dataset {name}: no such file or folder. {EXPECTED}")
    commit = check_dataset_reachable(name)
    source = _read_with_library(name, settings, "hub")
    source.commit = commit
    return source


def sort_splits(names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Split names -> the name of each role that is there, and the names of the rest, such as few-shot partitions."""
    names = list(names)
    roles = {}
    for role, spellings in SPLIT_NAMES.items():
        found = [name for spelling in spellings for name in names if name.lower() == spelling]
        if found:
            roles[role] = found[0]
    return roles, sorted(set(names) - set(roles.values()))


def choose_column(
    flag: str, given: str | None, columns: list[str], typed: list[str], names: Sequence[str], used: Sequence[str] = ()
) -> str:
    """The column to use: the one given, else the only or best named one of the right type, else the best named one.

    Args:
        flag: the setting that names the column, for messages.
        columns: all columns that come into question.
        typed: those of them that have the right type.
        names: usual names, best first.
        used: columns that have another use already, for messages.

    Raises:
        UsageError: the column given is not there, or none can be found.
    """
    taken = f" ({', '.join(used)} {'has' if len(used) == 1 else 'have'} another use)" if used else ""
    there = f"Columns there: {', '.join([*used, *columns]) or 'none'}{taken}."
    if given is not None:
        if given in columns:
            return given
        raise UsageError(f"{flag} {given}: no such column. {there}{did_you_mean(given, columns)}")
    candidates = typed or columns
    for name in names:
        for column in candidates:
            if column.lower() == name:
                return column
    if typed:
        return typed[0]
    raise UsageError(f"{flag}: no column was recognized by its type or name. {there} Name one with {flag}.")


def _reasoning_column(settings: Settings, columns: list[str], used: Sequence[str]) -> str | None:
    """The column given, which must be there."""
    if settings.reasoning_column is None:
        return None
    return choose_column("--reasoning-column", settings.reasoning_column, columns, [], [], used)


def _reasonings(values: Sequence[Any], names: list[str]) -> list[str | None]:
    """The texts of a column without what the response puts around them; None where there is none.

    Raises:
        UsageError: a value that is no text.
    """
    for value, name in zip(values, names, strict=True):
        if not (value is None or isinstance(value, str) or value != value):
            raise UsageError(
                f"--reasoning-column: {name} has a value of kind {type(value).__name__} there. Expected text."
            )
    return [reasoning_of(value) or None if isinstance(value, str) else None for value in values]


def _read_digits() -> Source:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)  # Nx8x8, 0..16 -> 0..255
    names = [f"digit {i}" for i in range(len(images))]
    rows = Rows(images, digits.target.tolist(), names)
    return Source("scikit-learn's handwritten digits", {"train": rows}, {"train": "train"}, class_names=list(DIGITS))


def _read_folder(folder: Path, settings: Settings) -> Source:
    if (folder / "dataset_dict.json").exists() or (
        (folder / "state.json").exists() and (folder / "dataset_info.json").exists()
    ):
        import datasets

        data = _loaded(folder, lambda: datasets.load_from_disk(str(folder)))
        return _from_library(
            data if isinstance(data, dict) else {"train": data}, settings, "save_to_disk folder", folder
        )
    tables = {
        path.stem: path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in TABLES and path.stem != "metadata"
    }
    roles, others = sort_splits(tables)
    if "train" in roles:
        return _read_tables({role: tables[name] for role, name in roles.items()}, others, settings)
    files = visible_files(folder)
    images = [file for file in files if is_image(file) and len(file.parts) > 1]
    if len(tables) == 1 and len({image.parts[0] for image in images}) < 2:
        return _read_tables({"train": next(iter(tables.values()))}, [], settings)
    if images and not any(
        file.name in LIBRARY_FILES or file.suffix in LIBRARY_ENDINGS for file in files if len(file.parts) <= 2
    ):
        return _read_image_folders(folder, images)
    if files and not tables and all(is_image(file) and len(file.parts) == 1 for file in files):
        raise UsageError(
            f"--dataset {folder}: the images lie directly in it, and nothing says their classes. Make one folder a class."
        )
    return _read_with_library(str(folder), settings, "folder", folder)


def _read_image_folders(folder: Path, images: list[Path]) -> Source:
    """CLASS/IMAGE or SPLIT/CLASS/IMAGE, with further folders below CLASS. Images directly in SPLIT have no label.

    A class may be called "train" (of vehicles, say): folders are splits if no folder with another name holds images
    directly.
    """
    roles, others = sort_splits(
        path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
    direct = {image.parts[0] for image in images if len(image.parts) == 2}
    if not roles or direct - set(roles.values()):
        rows = Rows([folder / image for image in images], [image.parts[0] for image in images], list(map(str, images)))
        return Source("image folder", {"train": rows}, {"train": "the folder"})
    splits = {}
    for role, name in roles.items():
        found = [image for image in images if image.parts[0] == name]
        labels = [image.parts[1] if len(image.parts) > 2 else None for image in found]
        splits[role] = Rows([folder / image for image in found], labels, list(map(str, found)))
    if "train" in splits and splits["train"].labels and not any(splits["train"].labels):
        raise UsageError(
            f"--dataset {folder}: the images lie directly in {roles['train']}, not in folders of classes. {EXPECTED}"
        )
    return Source("image folder", splits, roles, others)


def _read_tables(paths: dict[str, Path], others: list[str], settings: Settings) -> Source:
    """CSV and JSONL files, by role; the paths of images in them are relative to the file."""
    tables = {
        role: _read_csv(path) if path.suffix.lower() in (".csv", ".tsv") else _read_jsonl(path)
        for role, path in paths.items()
    }
    for role, table in tables.items():
        if not table:
            raise UsageError(f"{paths[role]}: no rows. Expected a header (CSV) and one line for each image.")
    columns = list(dict.fromkeys(column for table in tables.values() for row in table[:1000] for column in row))
    image = choose_column("--image-column", settings.image_column, columns, [], IMAGE_COLUMNS)
    label = choose_column(
        "--label-column", settings.label_column, [c for c in columns if c != image], [], LABEL_COLUMNS, [image]
    )
    reasoning = _reasoning_column(settings, [c for c in columns if c not in (image, label)], [image, label])
    splits = {}
    for role, table in tables.items():
        names = [str(row.get(image) or "") for row in table]
        images = [paths[role].parent / name if name else None for name in names]
        names = [name or f"row {i + 1}" for i, name in enumerate(names)]
        texts = _reasonings([row.get(reasoning) for row in table], names) if reasoning else None
        splits[role] = Rows(images, [row.get(label) for row in table], names, texts)
    kind = "CSV" if all(path.suffix.lower() in (".csv", ".tsv") for path in paths.values()) else "JSONL"
    split_names = {role: path.name for role, path in paths.items()}
    return Source(f"{kind} file", splits, split_names, others, None, image, label, reasoning)


def _read_csv(path: Path) -> list[dict[str, Any]]:
    """The rows of a table with a header, separated by commas, semicolons or tabs."""
    text = _read_text(path)
    header = text.split("\n", 1)[0]
    reader = csv.DictReader(
        io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count), skipinitialspace=True
    )
    rows = []
    try:
        for row in reader:
            if None in row:
                raise UsageError(
                    f"{path}, line {reader.line_num}: more fields than the header has. Put quotes around fields with separators."
                )
            rows.append({name.strip(): value.strip() if value else None for name, value in row.items()})
    except csv.Error as error:
        raise UsageError(f"{path}, line {reader.line_num}: not CSV ({error}).") from error
    return rows


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UsageError(f"{path}, line {number}: not JSON ({error}).") from error
            if not isinstance(row, dict):
                raise UsageError(
                    f'{path}, line {number}: expected an object such as {{"image": "a.png", "label": "cat"}}.'
                )
            rows.append(row)
    return rows


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a readable text file in UTF-8 ({reason(error)}).") from error


def _read_with_library(name: str, settings: Settings, kind: str, folder: Path = Path()) -> Source:
    """Whatever `datasets.load_dataset` understands: a hub id, or a folder such as a clone of one."""
    import datasets

    def load() -> Any:
        try:
            return datasets.load_dataset(name, settings.dataset_config)
        except ValueError as error:
            names = datasets.get_dataset_config_names(name)
            if settings.dataset_config in names or len(names) < 2:
                raise
            found = (
                f"no configuration {settings.dataset_config}"
                if settings.dataset_config
                else "there are several configurations"
            )
            raise UsageError(
                f"--dataset {name}: {found}. Choose one with --dataset-config: {', '.join(names)}."
            ) from error

    return _from_library(_loaded(name, load), settings, kind, folder)


def _loaded(name: str | Path, load: Callable[[], Any]) -> Any:
    """What `load` returns; the many ways in which it can fail become one line."""
    try:
        return load()
    except (MemoryError, UsageError):
        raise
    except Exception as error:
        if type(error).__name__ == "EmptyDatasetError":
            raise UsageError(f"--dataset {name}: nothing there that can be read as a dataset. {EXPECTED}") from error
        text = " ".join(str(error).split())
        raise UsageError(f"--dataset {name}: cannot be loaded ({type(error).__name__}: {text}). {EXPECTED}") from error


class _Column:
    """The images of a column of a `datasets.Dataset`, read from disk when asked for and not decoded. Can be pickled."""

    def __init__(self, data: Any, column: str, folder: Path) -> None:
        import datasets

        self._data = data.select_columns([column])
        if isinstance(data.features[column], datasets.Image):
            self._data = self._data.cast_column(column, datasets.Image(decode=False))
        self._column, self._folder = column, folder

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Any:
        value = self._data[int(index)][self._column]
        if isinstance(value, dict):  # an Image feature
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str):
            return self._folder / value
        return value


def _from_library(data: dict[str, Any], settings: Settings, kind: str, folder: Path) -> Source:
    """A `DatasetDict` -> rows. Columns are chosen by the train split; the other splits must have them too."""
    import datasets

    roles, others = sort_splits(data)
    if "train" not in roles:
        return Source(kind, {}, {}, others)
    features = data[roles["train"]].features
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    image = choose_column("--image-column", settings.image_column, list(features), images, IMAGE_COLUMNS)
    rest = [name for name in features if name != image]
    classes = [name for name in rest if isinstance(features[name], datasets.ClassLabel)]
    label = choose_column("--label-column", settings.label_column, rest, classes, LABEL_COLUMNS, [image])
    reasoning = _reasoning_column(settings, [name for name in rest if name != label], [image, label])
    splits = {}
    for role, name in roles.items():
        part = data[name].with_format(None)
        if image not in part.features:
            raise UsageError(
                f"--image-column {image}: train has it, but {name} has not. Columns there: {', '.join(part.features)}."
            )
        labels = part[label][:] if label in part.features else [None] * len(part)
        own = [f"{name}[{i}]" for i in range(len(part))]
        texts = _reasonings(part[reasoning][:], own) if reasoning in part.features else None
        splits[role] = Rows(_Column(part, image, folder), labels, own, texts)
    names = list(features[label].names) if label in classes else None
    return Source(kind, splits, roles, others, names, image, label, reasoning)
