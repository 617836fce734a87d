"""Folders: tables of splits, CLASS/IMAGE, SPLIT/CLASS/IMAGE; other layouts go to the `datasets` library."""

from collections.abc import Sequence
from pathlib import Path

from vlm.common.errors import UsageError
from vlm.config import Settings
from vlm.data.images import is_image, visible_files
from vlm.data.sources.library import is_saved, left_to_library, read_saved, read_with_library
from vlm.data.sources.rows import EXPECTED, Rows, Source, sort_splits
from vlm.data.sources.tables import find_tables, read_tables


def read_folder(folder: Path, settings: Settings) -> Source:
    """Read a folder of any layout.

    Raises:
        UsageError: the layout is not understood, or the files in it cannot be read.
    """
    if is_saved(folder):
        return read_saved(folder, settings)
    tables = find_tables(folder)
    roles, others = sort_splits(tables)
    if "train" in roles:
        return read_tables({role: tables[name] for role, name in roles.items()}, others, settings)
    files = visible_files(folder)
    images = [file for file in files if is_image(file) and len(file.parts) > 1]
    folders_with_images = {image.parts[0] for image in images}
    if len(tables) == 1 and len(folders_with_images) < 2:
        return read_tables({"train": next(iter(tables.values()))}, [], settings)
    if images and not left_to_library(files):
        return _read_image_folders(folder, images)
    if files and not tables and all(is_image(file) and len(file.parts) == 1 for file in files):
        raise UsageError(
            f"--dataset {folder}: the images are directly in this folder, so their classes are unknown. "
            "Make one folder for each class."
        )
    return read_with_library(str(folder), settings, "folder", folder)


def _read_image_folders(folder: Path, images: list[Path]) -> Source:
    """CLASS/IMAGE or SPLIT/CLASS/IMAGE, with any folders below CLASS. Images directly in SPLIT have no label.

    A class may be called "train" (of vehicles, say): folders are splits only if no folder with another name has images
    directly in it.

    Args:
        images: their paths, relative to `folder`.
    """
    roles, others = sort_splits(
        path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
    direct = {image.parts[0] for image in images if len(image.parts) == 2}
    if not roles or direct - set(roles.values()):
        labels = [image.parts[0] for image in images]
        return Source("image folder", {"train": _rows(folder, images, labels)}, {"train": "the folder"})
    splits = {}
    for role, name in roles.items():
        found = [image for image in images if image.parts[0] == name]
        labels = [image.parts[1] if len(image.parts) > 2 else None for image in found]
        splits[role] = _rows(folder, found, labels)
    if "train" in splits and splits["train"].labels and not any(splits["train"].labels):
        raise UsageError(
            f"--dataset {folder}: the images are directly in {roles['train']}, not in folders of classes. {EXPECTED}"
        )
    return Source("image folder", splits, roles, others)


def _rows(folder: Path, images: list[Path], labels: Sequence[str | None]) -> Rows:
    return Rows([folder / image for image in images], labels, [str(image) for image in images])
