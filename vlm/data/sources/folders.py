"""A folder of any layout: written by save_to_disk, tables of splits, image folders, or read by `datasets`."""

import os
from pathlib import Path

from vlm.common import UsageError, listed, note, reason
from vlm.config import Settings
from vlm.data.finding import count_by_ending, heic_hint, is_hidden, is_image, visible_files
from vlm.data.sources.archives import is_archive, stem_of, unpacked
from vlm.data.sources.foreign import ARCHIVES, SAVE_AS_CSV, SPREADSHEETS, UNPACK, refuse_damaged
from vlm.data.sources.image_folders import read_image_folders, read_unlabeled
from vlm.data.sources.library import (
    ENDINGS,
    FILES,
    is_saved,
    left_to_library,
    read_data_files,
    read_saved,
    read_with_library,
)
from vlm.data.sources.roles import role_of, sort_splits
from vlm.data.sources.rows import Source, files_by_split, nothing_there
from vlm.data.sources.shards import is_shard, read_shards
from vlm.data.sources.tables import find_split_tables, find_tables, is_table, read_tables

# Other files that the library may know how to read, if there is no image and no table of ours.
OF_THE_LIBRARY = (*ENDINGS, ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".txt", ".tar", ".lance", ".h5", ".hdf5")
MOST_NESTED = 3  # archives in archives; one of them may hold itself
ROWS_TRIED = 100  # of a table, to tell whether its images are there


def read_archive(path: Path, settings: Settings) -> Source:
    """Read an archive as the folder that it holds.

    Raises:
        UsageError: it cannot be unpacked, or see `read_folder`.
    """
    return read_folder(unpacked({path: Path()}), settings, nested=1)


def read_folder(folder: Path, settings: Settings, nested: int = 0) -> Source:
    """Read a folder of any layout.

    Args:
        nested: how many archives it was in.

    Raises:
        UsageError: the layout is not understood, or the files in it cannot be read.
    """
    folder = _unwrapped(folder, Path(settings.dataset or "").name if nested else str(folder))
    if is_saved(folder):
        return read_saved(folder, settings)
    if archives := _archives(folder):
        return _read_archives(folder, archives, settings, nested)
    tables = find_tables(folder)
    roles, others = sort_splits(tables)
    if "train" in roles or (roles and not settings.labels_needed):
        return read_tables({role: tables[name] for role, name in roles.items()}, others, settings)
    of_splits, others = find_split_tables(folder, settings)
    if of_splits:
        return read_tables(of_splits, others, settings)
    files = visible_files(folder)
    images = [file for file in files if is_image(file) and len(file.parts) > 1]
    folders_with_images = {image.parts[0] for image in images}
    if len(tables) == 1 and len(folders_with_images) < 2:
        return read_tables({"train": next(iter(tables.values()))}, [], settings)
    if images and len(tables) == 1 and (source := _labeled_by_table(next(iter(tables.values())), settings)):
        return source
    if not tables:
        _refuse_spreadsheets(folder, files, folders_with_images)
    data = [folder / file for file in files if file.suffix.lower() in ENDINGS and len(file.parts) == 1]
    if data and any(map(is_image, files)):  # the library would read either the images or the data
        return read_data_files(files_by_split(data), folder, settings)
    if images and not left_to_library(files):
        return read_image_folders(folder, files, [path.name for path in tables.values()], settings.labels_needed)
    if not settings.labels_needed and any(map(is_image, files)) and not left_to_library(files):
        return read_unlabeled(folder, files)
    _check_files(folder, files)
    source = read_with_library(str(folder), settings, "folder", folder)
    _note_without_rows(source, files)
    return source


def _labeled_by_table(table: Path, settings: Settings) -> Source | None:
    """The images of a table that lies next to several folders of images; None if it has no labels of images there."""
    try:
        source = read_tables({"train": table}, [], settings)
        images = source.splits["train"].images
        there = any(os.path.exists(str(images[row])) for row in range(min(len(images), ROWS_TRIED)))
    except (UsageError, KeyError):
        there = False
    if there and source.columns and source.columns.label:
        note(f"note: the labels are those of {table}, not the names of the folders next to it.")
        return source
    note(
        f"note: not used: {table}, as it does not say where images are and what they show. The folders are the classes."
    )
    return None


def _archives(folder: Path) -> list[Path]:
    """The archives in a folder, or in its folders of splits, if their content is the dataset."""
    places = [folder, *(path for path in _entries(folder) if path.is_dir())]
    if not all(role_of(path.name) or path.name == "data" for path in places[1:]):
        places = [folder]  # the others are class folders
    entries = [path for place in places for path in sorted(_entries(place)) if path not in places]
    archives = [path for path in entries if is_archive(path)]
    used = [path for path in entries if path.is_dir() or is_image(path) or path.suffix.lower() in ENDINGS]
    if archives and used:
        found = listed(path.relative_to(folder) for path in archives)
        note(f"note: archives that are not used, as there are unpacked files, too: {found}.")
    return [] if used else archives


def _read_archives(folder: Path, archives: list[Path], settings: Settings, nested: int) -> Source:
    """Shards of WebDataset in place; other archives unpacked, with the tables that lie next to them."""
    if all(map(is_shard, archives)):
        return read_shards(archives, settings)
    if nested >= MOST_NESTED:
        raise UsageError(f"--dataset {settings.dataset}: archives in archives, {nested} deep. {UNPACK}")
    tables = [path for path in sorted(_entries(folder)) if is_table(path)]
    places = {path: _place(path.relative_to(folder), archives, bool(tables)) for path in archives}
    return read_folder(unpacked(places, tables), settings, nested + 1)


def _place(archive: Path, archives: list[Path], tables: bool) -> Path:
    """Where an archive is unpacked: into a folder of its name if that says something, as a split or one of several.

    Args:
        archive: its path in the folder that is read.
        archives: all of them.
        tables: whether tables lie next to them.
    """
    name = stem_of(archive)
    beside = sum(path.parent.name == archive.parent.name for path in archives) if archive.parent.name else len(archives)
    alone = beside == 1 and not tables and not role_of(name)
    return archive.parent if alone else archive.parent / name


def _refuse_spreadsheets(folder: Path, files: list[Path], with_images: set[str]) -> None:
    """Refuse a folder with a spreadsheet, if the images are not in folders of classes or splits."""
    sheets = [file for file in files if file.suffix.lower() in SPREADSHEETS and len(file.parts) == 1]
    if sheets and len(with_images) < 2 and not any(map(role_of, with_images)):
        raise UsageError(
            f"--dataset {folder}: no folders of classes, and no table but {sheets[0]}, a spreadsheet. {SAVE_AS_CSV}"
        )


def _note_without_rows(source: Source, files: list[Path]) -> None:
    """Say if a folder has more images than its metadata files have rows, as the library leaves them out in silence."""
    images, rows = sum(map(is_image, files)), sum(len(rows.labels) for rows in source.splits.values())
    if any(file.name in FILES for file in files) and not source.others and rows < images:
        note(f"note: not used: {images - rows:,} images without a row in a metadata file.")


def _unwrapped(folder: Path, name: str) -> Path:
    """The folder itself, or the only one in it that holds everything, as an unpacked archive often has it.

    A folder that is called like a split or has images as a class has is not such a one.

    Args:
        name: what messages call the folder.
    """
    inner, seen = folder, set()
    while (wrapped := _only_folder(inner)) and wrapped.resolve() not in seen:
        inner = wrapped
        seen.add(inner.resolve())
    if inner == folder or not _could_be_dataset(inner):
        return folder
    if not (is_archive(Path(name)) and inner.name == stem_of(Path(name))):
        note(f"note: {name} has nothing but {inner.relative_to(folder)}, which is read as the dataset.")
    return inner


def _only_folder(folder: Path) -> Path | None:
    entries = _entries(folder)
    return entries[0] if len(entries) == 1 and entries[0].is_dir() and not role_of(entries[0].name) else None


def _could_be_dataset(folder: Path) -> bool:
    """Whether a folder has files of tables, several folders, or a split, and no images directly in it."""
    entries = _entries(folder)
    folders = [path for path in entries if path.is_dir()]
    if any(is_table(path) or path.suffix in ENDINGS for path in entries):
        return True
    return (len(folders) > 1 or any(role_of(path.name) for path in folders)) and not any(map(is_image, entries))


def _entries(folder: Path) -> list[Path]:
    """What is directly in a folder, without hidden files and what macOS adds to archives."""
    try:
        return [path for path in folder.iterdir() if not is_hidden(path.name)]
    except OSError as error:
        raise UsageError(f"--dataset {folder}: cannot be read ({reason(error)}). Allow to read it.") from error


def _check_files(folder: Path, files: list[Path]) -> None:
    """Refuse a folder without labeled images in it of which the library could not make anything either."""
    if files and all(is_image(file) and len(file.parts) == 1 for file in files):
        raise UsageError(
            f"--dataset {folder}: the images are directly in this folder, so their classes are unknown. "
            "Make one folder for each class."
        )
    refuse_damaged(folder / file for file in files if file.suffix in ENDINGS or file.name in FILES)
    if any(file.suffix.lower() in OF_THE_LIBRARY or is_image(file) for file in files):
        return
    if archives := [file for file in files if file.suffix.lower() in ARCHIVES or is_archive(file)]:
        raise UsageError(f"--dataset {folder}: the files are in an archive ({listed(archives, 3)}). {UNPACK}")
    raise nothing_there(folder, f"Files there: {count_by_ending(files)}.{heic_hint(files)} " if files else "")
