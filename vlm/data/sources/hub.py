"""A dataset on the hub: what says how it is read is fetched first, then only the files that are needed."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from vlm.common import UsageError, listed
from vlm.config import Settings
from vlm.data.classes import check_max_samples
from vlm.data.finding import is_image
from vlm.data.hub import CARD_FILES, HubDataset, find_dataset
from vlm.data.hub_errors import failure, refusal
from vlm.data.sources.archives import is_archive
from vlm.data.sources.asked_splits import asked_splits, choose_splits
from vlm.data.sources.columns import Columns, choose_columns
from vlm.data.sources.folders import read_folder
from vlm.data.sources.library import (
    ENDINGS,
    FILES,
    class_columns,
    errors_in_one_line,
    image_columns,
    load_files,
    refuse_configuration,
    to_source,
)
from vlm.data.sources.remote import fetch_sample, hidden_rows, read_schema
from vlm.data.sources.roles import role_of
from vlm.data.sources.rows import HUB, Rows, Source, nothing_there
from vlm.data.sources.streamed import read_stream
from vlm.data.sources.tables import is_table

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder

# Files that the library reads, with those of `ENDINGS`: what a card says about them is heard.
OF_THE_LIBRARY = (*ENDINGS, ".csv", ".tsv", ".json", ".jsonl")


def read_hub(name: str, settings: Settings) -> Source:
    """Read a dataset on the hub, or in its cache if the hub does not answer.

    Raises:
        UsageError: there is no such dataset, it cannot be used, or access is refused.
        RunError: the hub fails, or the download broke off.
    """
    found = find_dataset(name)
    with _hub_errors(found):
        if settings.streaming:
            source = _read_stream(found, settings)
        elif _is_of_columns(found):
            source = _read_columns(found, settings)
        else:
            source = _read_files(found, settings)
    source.hub_id, source.commit = found.id, found.commit
    return source


@contextmanager
def _hub_errors(found: HubDataset) -> Iterator[None]:
    """What the hub answers is said as such, wherever a library meets it."""
    try:
        yield
    except Exception as error:
        about = ("dataset", found.name)
        said = refusal(*about, found.asked.revision, error) or failure(*about, error)
        if said is None or isinstance(error, type(said)):
            raise
        raise said from error


def _is_of_columns(found: HubDataset) -> bool:
    """Whether the `datasets` library reads it as columns, rather than that it is a folder as any other one."""
    files = found.data_files()
    if any(PurePosixPath(file).suffix in ENDINGS for file in files) or _tables_apart(files):
        return True
    card = found.folder / CARD_FILES[0] if found.folder else None
    if card is None or not card.exists() or any(is_archive(Path(file)) for file in files):
        return False
    from huggingface_hub import DatasetCard

    with errors_in_one_line(found.name):
        return bool(DatasetCard.load(card).data.get("configs"))


def _tables_apart(files: Sequence[str]) -> list[str]:
    """The tables, if all of them are in folders that are not called like a split, with images elsewhere."""
    tables = [file for file in files if is_table(Path(file)) and PurePosixPath(file).name not in FILES]
    folders = {PurePosixPath(file).parts[0] if "/" in file else "train" for file in tables}
    return [] if any(map(role_of, folders)) or any(is_archive(Path(file)) for file in files) else tables


def _read_stream(found: HubDataset, settings: Settings) -> Source:
    """Open a stream; without the hub, that of the files in the cache."""
    if found.silence is not None:
        return read_stream(settings, str(found.fetch(found.data_files())), HUB)
    return read_stream(settings, f"hf://datasets/{found.id}", HUB, found.commit)


def _read_files(found: HubDataset, settings: Settings) -> Source:
    """Read folders of images, tables and archives, as they are read on this machine."""
    files = [file for file in found.data_files() if _may_be_data(Path(file))]
    if not files:
        _refuse_code(found)
        raise nothing_there(found.name)
    source = read_folder(found.fetch(files), settings)
    source.kind = f"{HUB}, {source.kind}"
    return source


def _may_be_data(file: Path) -> bool:
    return is_image(file) or is_table(file) or is_archive(file) or file.suffix.lower() in OF_THE_LIBRARY


def _refuse_code(found: HubDataset) -> None:
    """Refuse a dataset whose data a program of its own would fetch: no code of a dataset is run."""
    if code := [file for file in found.files if file.endswith(".py")]:
        raise UsageError(
            f"--dataset {found.name}: it is loaded by a program of its own ({listed(code, 3)}), and no code of a "
            "dataset is run. Choose a copy of it that has Parquet files, or load it yourself and give the folder."
        )


@dataclass(frozen=True)
class _Layout:
    """What the library makes of the files. files: by split; features: the types of the columns; None if unknown;
    config: the configuration; module: what of the library reads the files, such as parquet."""

    files: dict[str, list[str]]
    features: Any
    config: str
    module: str


def _read_columns(found: HubDataset, settings: Settings) -> Source:
    """Read files of columns: first the types of the columns, then only the splits that are used."""
    layout = _layout(found, settings)
    roles, others = choose_splits(layout.files, settings)
    if "train" not in roles:
        return Source(HUB, {}, {}, others)
    if settings.folds and not settings.dataset_split and "test" in roles:  # no fold has it
        others = sorted([*others, roles.pop("test")])
    features = layout.features
    if features is None and layout.module == "parquet":
        features = _schema(found, layout.files[roles["train"]][0])
    columns = _check_first(features, settings)
    hidden: dict[str, int] = {}
    if columns and _names_of(features, columns):
        hidden = hidden_rows(found, {r: layout.files[s] for r, s in roles.items() if r != "train"}, columns.label)
    read = {role: split for role, split in roles.items() if role not in hidden}
    paths = _fetch(found, settings, {split: layout.files[split] for split in read.values()}, read, columns, features)
    data = load_files(found.name, found.folder or Path(), layout.module, layout.config, paths, features)
    folder = Path()
    if not image_columns(data[roles["train"]].features):  # the images are files of their own
        found.fetch([file for file in found.data_files() if is_image(Path(file))])
        folder = _folder_of(found, layout.files[roles["train"]], data[roles["train"]])
    source = to_source(data, settings, HUB, folder, read)
    source.others = others
    for role, count in hidden.items():
        source.splits[role] = Rows((), [-1] * count, [""] * count)
        source.split_names[role] = roles[role]
    return source


def _schema(found: HubDataset, file: str) -> Any:
    """The types of the columns of a Parquet file; None without the hub, if the file is not in the cache."""
    return read_schema(found, file) if found.silence is None or found.cached([file]) else None


def _names_of(features: Any, columns: Columns) -> list[str] | None:
    """The class names, if the type of the column of labels has them."""
    return getattr(features.get(columns.label), "names", None)


def _folder_of(found: HubDataset, files: Sequence[str], data: "Dataset") -> Path:
    """What the paths in a table are relative to: the repository or, if its first image is not there, the table."""
    folder = found.folder or Path()
    beside = (folder / files[0]).parent
    texts = [text for row in data.select(range(min(1, len(data)))) for text in row.values() if isinstance(text, str)]
    if not any((folder / text).is_file() for text in texts) and any((beside / text).is_file() for text in texts):
        return beside
    return folder


def _fetch(
    found: HubDataset,
    settings: Settings,
    files: Mapping[str, list[str]],
    roles: Mapping[str, str],
    columns: Columns | None,
    features: Any,
) -> dict[str, list[str]]:
    """Fetch the files of some splits or, with `--max-samples`, only as much of them as is used.

    Args:
        files: by split; roles: the split of each role.

    Returns:
        The paths on this machine, by split.
    """
    paths: dict[str, list[str]] = {}
    whole = dict(files)
    in_parts = any(one.part for one in asked_splits(settings))
    if settings.max_samples and columns and not columns.one_hot and not in_parts:
        classes = len(_names_of(features, columns) or ())
        for role, split in roles.items():
            most = _wanted(settings, role, roles)
            # Also if all files are in the cache, so that the same command has the same images.
            sample = fetch_sample(found, split, files[split], columns.label, most, classes, settings.seed)
            if sample is not None:
                paths[split] = [str(sample)]
                del whole[split]
    if whole:
        folder = found.fetch([file for some in whole.values() for file in some])
        paths |= {split: [str(folder / file) for file in some] for split, some in whole.items()}
    return paths


def _wanted(settings: Settings, role: str, roles: Mapping[str, str]) -> int:
    """The rows of a split that are needed for `--max-samples`: more of train, if other splits are cut from it."""
    most = settings.max_samples or 0
    if role != "train":
        return most
    ratios = {"validation": settings.validation_ratio, "test": settings.test_ratio}
    cut = [ratio for other, ratio in ratios.items() if other not in roles]
    return max([most, *(ceil(most / ratio) for ratio in cut), ceil(most / (1 - sum(cut)))])


def _check_first(features: Any, settings: Settings) -> Columns | None:
    """Refuse what can be refused before the data are fetched.

    Returns:
        The columns in use; None if that cannot be said yet.

    Raises:
        UsageError: a named column is not there, or `--max-samples` is smaller than the number of classes.
    """
    if features is None:
        return None
    try:
        columns = choose_columns(
            settings, list(features), image_columns(features), class_columns(features), values=lambda name: []
        )
    except UsageError:
        named = (settings.image_column, settings.label_column, settings.reasoning_column)
        if any(name is not None and name not in features for name in named):
            raise
        return None  # the values of the columns may tell
    if (names := _names_of(features, columns)) and settings.max_samples:
        check_max_samples(settings.max_samples, len(names))
    return columns


def _layout(found: HubDataset, settings: Settings) -> _Layout:
    """Ask the library what it makes of the names of the files, without any of their content."""
    with tempfile.TemporaryDirectory() as place, errors_in_one_line(found.name):
        folder = Path(place) / PurePosixPath(found.id).name
        for file in _names_that_count(found):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).touch()
        for file in CARD_FILES:
            if file in found.files and found.folder and (found.folder / file).exists():
                (folder / file).write_bytes((found.folder / file).read_bytes())
        builder = _builder(folder, found.name, settings.dataset_config)
        inside = {
            str(split): [Path(path).relative_to(folder.resolve()).as_posix() for path in some]
            for split, some in (builder.config.data_files or {}).items()
        }
        return _Layout(inside, builder.info.features, builder.config.name, builder.name)


def _names_that_count(found: HubDataset) -> list[str]:
    """The files of columns, and images only if the library is to read folders of them."""
    files = found.data_files()
    columns = [file for file in files if PurePosixPath(file).suffix in ENDINGS] or _tables_apart(files)
    return columns or files


def _builder(folder: Path, name: str, config: str | None) -> "DatasetBuilder":
    import datasets

    try:
        return datasets.load_dataset_builder(str(folder), config)
    except ValueError as error:
        raise refuse_configuration(name, config, datasets.get_dataset_config_names(str(folder))) or error from error
