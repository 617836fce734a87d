"""What the `datasets` library reads: Parquet files, folders with Parquet or metadata files, folders by save_to_disk."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.common import RunError, UsageError, listed, one_line, read_json, shorten
from vlm.config import Settings
from vlm.data.images import ImageSource
from vlm.data.sources.asked_splits import choose_splits
from vlm.data.sources.cells import find_images, image_of
from vlm.data.sources.columns import Columns, choose_columns, missing_column, reasoning_texts
from vlm.data.sources.foreign import AGAIN, refuse_damaged
from vlm.data.sources.groups import group_names
from vlm.data.sources.labels import one_hot_labels, text_column, use_names
from vlm.data.sources.places import Place, asked_place
from vlm.data.sources.roles import role_of
from vlm.data.sources.rows import EXPECTED, Rows, Source, nothing_there
from vlm.data.sources.split_column import use_split_column

if TYPE_CHECKING:  # the library takes a second to import
    from datasets import Dataset, DatasetDict, IterableDatasetDict

ENDINGS = (".parquet", ".arrow")
FILES = ("metadata.csv", "metadata.jsonl")
LONGEST_REASON = 200  # characters of what the library says


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by save_to_disk."""
    one_split = (folder / "state.json").exists() and (folder / "dataset_info.json").exists()
    return one_split or (folder / "dataset_dict.json").exists()


def left_to_library(files: Sequence[Path]) -> bool:
    """Whether a folder with images has, in it or one folder below, a file that only the library understands.

    Args:
        files: paths relative to the folder.
    """
    return any((file.name in FILES or file.suffix in ENDINGS) and len(file.parts) <= 2 for file in files)


def read_saved(folder: Path, settings: Settings) -> Source:
    """Read a folder that was written by save_to_disk.

    Raises:
        UsageError: the folder cannot be loaded, or a column is missing.
    """
    import datasets

    refuse_damaged(sorted(folder.rglob("*.arrow")))
    for path in sorted(folder.rglob("*.json")):
        if not isinstance(read_json(path, AGAIN), dict):
            raise UsageError(f"{path}: not what save_to_disk writes. {AGAIN}")
    with errors_in_one_line(folder):
        data = datasets.load_from_disk(str(folder))
    splits = _by_name(data) if isinstance(data, datasets.DatasetDict) else {"train": data}
    return to_source(splits, settings, "save_to_disk folder", folder)


def read_with_library(name: str, settings: Settings, kind: str, folder: Path = Path()) -> Source:
    """Read whatever `datasets.load_dataset` understands.

    Args:
        name: the path of a folder, such as a clone of a dataset on the hub.
        kind: what to call the source.
        folder: what paths in a column of texts are relative to.

    Raises:
        UsageError: the dataset cannot be loaded, has several configurations and none was chosen, or has no such column.
    """
    with errors_in_one_line(name):
        data = _load(name, settings.dataset_config)
    return to_source(_by_name(data), settings, kind, folder)


def read_data_files(files: Mapping[str, Sequence[Path]], folder: Path, settings: Settings) -> Source:
    """Read Parquet or Arrow files, some for each split.

    Args:
        files: by split.
        folder: what paths in them are relative to.

    Raises:
        UsageError: a file is damaged, or a column is missing.
    """
    first = next(iter(files.values()))[0]
    refuse_damaged([path for some in files.values() for path in some])
    kind = "parquet" if first.suffix.lower() == ".parquet" else "arrow"
    with errors_in_one_line(first):
        paths = {split: [str(path) for path in some] for split, some in files.items()}
        data = _load_dataset(kind, data_files=paths)
    return to_source(_by_name(data), settings, f"{kind.capitalize()} file", folder)


def open_streams(name: str, settings: Settings, revision: str | None) -> "IterableDatasetDict":
    """A dataset whose rows are read when they are asked for, with the types of its columns."""
    import datasets

    streams = datasets.load_dataset(name, settings.dataset_config, streaming=True, revision=revision)
    return datasets.IterableDatasetDict(
        {str(split): data if data.features else data._resolve_features() for split, data in streams.items()}
    )


def load_files(
    name: str, folder: Path, module: str, config: str, paths: Mapping[str, Sequence[str]], features: Any
) -> "dict[str, Dataset]":
    """Load some files of a folder.

    Args:
        name: what messages call the dataset.
        module: what of the library reads them, such as parquet.
        config: the configuration in the card of the folder.
        paths: by split.
        features: the types of the columns; None: as the files say.
    """
    with errors_in_one_line(name):
        files = {split: list(some) for split, some in paths.items()}
        if module in ("parquet", "arrow"):
            return _by_name(_load_dataset(module, data_files=files, features=features))
        no_counts = {"verification_mode": "no_checks"}  # other splits than those in the card
        return _by_name(_load_dataset(str(folder), config, data_files=files, features=features, **no_counts))


def _load_dataset(*what: Any, **how: Any) -> Any:
    """`datasets.load_dataset`, without the library's bars where they would become many lines."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return datasets.load_dataset(*what, **how)


def refuse_configuration(name: str, config: str | None, there: Sequence[str]) -> UsageError | None:
    """The error for a configuration that is not there, or was not chosen; None if that is not the problem."""
    if config in there or len(there) < 2:
        return None
    found = f"no configuration {config}" if config else "there are several configurations"
    return UsageError(f"--dataset {name}: {found}. Choose one with --dataset-config: {', '.join(there)}.")


def _load(name: str, config: str | None) -> "DatasetDict":
    import datasets

    try:
        return _load_dataset(name, config)
    except ValueError as error:
        raise refuse_configuration(name, config, datasets.get_dataset_config_names(name)) or error from error


@contextmanager
def errors_in_one_line(name: str | Path) -> Iterator[None]:
    """Loading fails in many ways; each becomes a UsageError of one line."""
    try:
        yield
    except (MemoryError, UsageError, RunError):
        raise
    except Exception as error:
        if type(error).__name__ == "EmptyDatasetError":
            raise nothing_there(name) from error
        cause: BaseException = error  # what the library hides: the error that all others were raised from
        while isinstance(cause.__cause__, Exception):
            cause = cause.__cause__
        raise UsageError(
            f"--dataset {name}: cannot be loaded ({type(cause).__name__}: {shorten(one_line(cause), LONGEST_REASON)}). "
            f"If a file is damaged, copy or download it again. {EXPECTED}"
        ) from error


def _by_name(data: "DatasetDict") -> "dict[str, Dataset]":
    return {str(name): split for name, split in data.items()}


def to_source(
    data: "dict[str, Dataset]", settings: Settings, kind: str, folder: Path, roles: Mapping[str, str] | None = None
) -> Source:
    """The splits of a `DatasetDict` as rows. The train split decides the columns and the class names.

    Args:
        folder: what paths in a column of texts are relative to.
        roles: the split of each role; None: those that the settings or the names of the splits say.

    Raises:
        UsageError: a column or a split is missing.
    """
    chosen, others = choose_splits(data, settings) if roles is None else (dict(roles), [])
    roles = chosen
    if "train" not in roles:
        return Source(kind, {}, {}, sorted(data))
    features = data[roles["train"]].features
    names = {name: feature.names for name, feature in features.items() if hasattr(feature, "names")}
    columns = choose_columns(
        settings,
        list(features),
        image_columns(features),
        class_columns(features),
        values=lambda name: _values(data[roles["train"]], name),
    )
    for name in roles.values():
        _check_columns(data[name].features, name, columns, features)
    place = asked_place(settings, folder)
    splits = {role: _rows(data[name].with_format(None), name, columns, place) for role, name in roles.items()}
    source = Source(kind, splits, roles, others, names.get(columns.label), columns)
    text = text_column(columns.label, [name for name in features if name not in columns.used])
    if text and source.class_names is None:
        texts = {role: _values(data[name], text) for role, name in roles.items()}
        source.name_labels(use_names({role: rows.labels for role, rows in splits.items()}, texts, columns.label, text))
    return use_split_column(source, {role: _unused(data[name], columns) for role, name in roles.items()})


def image_columns(features: Mapping[str, Any]) -> list[str]:
    """The columns whose type is image."""
    return [name for name, feature in features.items() if is_image_column(feature)]


def class_columns(features: Mapping[str, Any]) -> list[str]:
    """The columns whose type is class label, unless their classes are names of splits."""
    names = {name: feature.names for name, feature in features.items() if hasattr(feature, "names")}
    return [name for name, words in names.items() if not all(map(role_of, words))]


def is_image_column(feature: object) -> bool:
    """Whether a column has images, or lists of them."""
    import datasets

    return isinstance(getattr(feature, "feature", feature), datasets.Image)


def _values(data: "Dataset", column: str) -> Sequence[Any]:
    """The values of a column of numbers or texts, read when asked for; of no other column, which may be large. None for
    each row, if there is no such column."""
    import datasets

    if column not in data.features:
        return [None] * len(data)
    return data[column] if isinstance(data.features[column], datasets.Value) else []


def _unused(data: "Dataset", columns: Columns) -> dict[str, Sequence[object]]:
    """The columns without a use, with their values if these are texts, read only when asked for."""
    import datasets

    unused: dict[str, Sequence[object]] = {}
    for name, feature in data.features.items():
        if name in columns.used:
            continue
        unused[name] = ()
        if isinstance(feature, datasets.Value) and "string" in feature.dtype:
            unused[name] = data[name]
        elif isinstance(feature, datasets.ClassLabel):
            unused[name] = [None if value is None or value < 0 else feature.names[value] for value in data[name][:]]
    return unused


def _check_columns(there: Mapping[str, Any], split: str, columns: Columns, train: Mapping[str, Any]) -> None:
    """Refuse a split whose image column is missing, or whose label column numbers the classes otherwise than train's.

    Args:
        there, train: the features of the split and of train.
    """
    if columns.image not in there:
        raise missing_column(columns.image, split, there)
    names = [getattr(features.get(columns.label), "names", None) for features in (there, train)]
    if columns.label in there and names[0] != names[1]:
        raise UsageError(
            f"{split}: the column {columns.label} has other class names than train: {listed(names[0] or ['none'])}; "
            f"train has {listed(names[1] or ['none'])}. Give all splits the same names in the same order."
        )


def _rows(data: "Dataset", split: str, columns: Columns, place: Place) -> Rows:
    """The rows of one split; without a label column, all labels are None."""
    names = [f"{split}[{i}]" for i in range(len(data))]
    if columns.one_hot:
        labels: Sequence[Any] = one_hot_labels({name: _values(data, name) for name in columns.one_hot}, names, split)
    else:
        labels = data[columns.label][:] if columns.label in data.features else [None] * len(data)
    texts = None
    if columns.reasoning is not None and columns.reasoning in data.features:
        texts = reasoning_texts(data[columns.reasoning][:], names)
    groups = group_names(_values(data, columns.group)[:], split) if columns.group else None
    return Rows(ImageColumn(data, columns.image, place, split), labels, names, texts, groups)


class ImageColumn:
    """The images of a column of a `datasets.Dataset`, read from disk only when asked for, not decoded. Can be pickled.

    Args:
        place: where the files of a column of texts are looked for.
        split: the name of the split, for messages.

    Raises:
        UsageError: none of the first paths in a column of texts is there, and what is there says why.
    """

    def __init__(self, data: "Dataset", column: str, place: Place, split: str) -> None:
        self._data = data.select_columns([column])
        if is_image_column(data.features[column]):
            self._data = self._data.cast_column(column, not_decoded(data.features[column]))
        else:
            place = find_images(place, self._data[column], column, split)
        self._column, self._place, self._split = column, place, split

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, row: int) -> ImageSource | None:
        """Raises UsageError if the cell has several images, or a text that is no path."""
        value: Any = self._data[int(row)][self._column]
        return image_of(value, self._place, f"{self._split}[{row}], column {self._column}")


def not_decoded(feature: Any) -> Any:
    import datasets

    image = datasets.Image(decode=False)
    return image if isinstance(feature, datasets.Image) else datasets.List(image, length=feature.length)
