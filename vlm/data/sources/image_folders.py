"""Folders of images: CLASS/IMAGE or SPLIT/CLASS/IMAGE. What is in them and is not used is said."""

import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from vlm.common import UsageError, listed, note, printable
from vlm.data.finding import count_by_ending, heic_hint, is_hidden, is_image
from vlm.data.sources.roles import role_of, sort_splits
from vlm.data.sources.rows import EXPECTED, Rows, Source


def read_image_folders(
    folder: Path, files: Sequence[Path], tables: Sequence[str], labels_needed: bool = True
) -> Source:
    """CLASS/IMAGE or SPLIT/CLASS/IMAGE, with any folders below CLASS. Images directly in SPLIT have no label.

    A class may be called "train" (of vehicles, say): folders are splits only if no folder with another name has images
    directly in it.

    Args:
        files: all visible files, relative to `folder`; some below it are images.
        tables: the names of the tables in it, for messages.
        labels_needed: whether train has to have labels, and an image of each class.

    Raises:
        UsageError: a class folder has no image, or the images of train are not in folders of classes.
    """
    images = [file for file in files if is_image(file) and len(file.parts) > 1]
    roles, others = sort_splits(path.name for path in _folders(folder))
    direct = {image.parts[0] for image in images if len(image.parts) == 2}
    if not roles or direct - set(roles.values()):
        if labels_needed:
            _check_classes(folder, "", files)
        _refuse_splits(folder, direct)
        _note_unused(files, [] if labels_needed else _empty(folder, "", files))
        if labels_needed:
            _point_out_same_folders(images)
        labels = [image.parts[0] for image in images]
        return Source("image folder", {"train": _rows(folder, images, labels)}, {"train": "the folder"})
    splits: dict[str, Rows] = {}
    for role, name in roles.items():
        found = [image for image in images if image.parts[0] == name]
        below = [image.parts[1] if len(image.parts) > 2 else None for image in found]
        splits[role] = _rows(folder, found, below)
    if labels_needed and "train" in splits and splits["train"].labels and not any(splits["train"].labels):
        cure = f"If a table has the labels, give it to --dataset: {listed(tables)}." if tables else EXPECTED
        raise UsageError(
            f"--dataset {folder}: the images are directly in {roles['train']}, not in folders of classes. {cure}"
        )
    if labels_needed and "train" in roles:
        _check_classes(folder, roles["train"], files)
        _point_out_same_folders([Path(*image.parts[1:]) for image in images if image.parts[0] == roles["train"]])
    held_out = [name for role, name in roles.items() if role != "train" or not labels_needed]
    _note_unused(files, [empty for name in held_out for empty in _empty(folder, name, files)])
    return Source("image folder", splits, roles, others)


def read_unlabeled(folder: Path, files: Sequence[Path]) -> Source:
    """Images directly in a folder, whose classes are unknown.

    Args:
        files: all visible files, relative to `folder`.
    """
    images = [file for file in files if is_image(file)]
    if other := [file for file in files if not is_image(file)]:
        note(f"note: not used: files that do not count as images: {count_by_ending(other)}.{heic_hint(other)}")
    return Source("folder of images", {"train": _rows(folder, images, [None] * len(images))}, {"train": "the folder"})


def _refuse_splits(folder: Path, names: Collection[str]) -> None:
    """Refuse folders such as train_images and test_images, whose names would be learned as classes."""
    if len(names) > 1 and all(any(map(role_of, re.split(r"[-_. ]", name))) for name in names):
        raise UsageError(
            f"--dataset {folder}: {listed(sorted(names))} look like splits, not like classes. Call them train, val and "
            "test, with a folder for each class in them, or give the tables that have the labels."
        )


def _point_out_same_folders(images: Sequence[Path]) -> None:
    """Say if all class folders have the same folders in them, which may be the classes, or splits.

    Args:
        images: relative to the folder of the class folders.
    """
    inner: dict[str, set[str]] = {}
    for image in images:
        if len(image.parts) > 1:
            inner.setdefault(image.parts[0], set()).add(image.parts[1] if len(image.parts) > 2 else "")
    same = next(iter(inner.values()), set())
    if len(inner) > 1 and len(same - {""}) > 1 and all(names == same for names in inner.values()):
        note(
            f"warning: the classes are {listed(sorted(inner))}, and each of these folders has the folders "
            f"{listed(sorted(same - {''}))}. If those are the classes, or splits, let them be the outer folders."
        )


def _folders(folder: Path) -> list[Path]:
    """The visible folders directly in a folder, and links to folders that are gone, sorted."""
    found = [path for path in folder.iterdir() if path.is_dir() or (path.is_symlink() and not path.exists())]
    return sorted(path for path in found if not is_hidden(path.name))


def _empty(folder: Path, split: str, files: Sequence[Path]) -> list[Path]:
    """The class folders of a split that have no image, relative to `folder`; of the folder itself, if it is ""."""
    place = Path(split)
    depth = len(place.parts)
    used = {file.parts[: depth + 1] for file in files if is_image(file) and len(file.parts) > depth + 1}
    return [place / path.name for path in _folders(folder / place) if (place / path.name).parts not in used]


def _check_classes(folder: Path, split: str, files: Sequence[Path]) -> None:
    """Refuse classes of train that would disappear, as none of their files is an image."""
    empty = _empty(folder, split, files)
    if not empty:
        return
    found = [f"{path.name} ({_content(folder, path, files)})" for path in empty]
    raise UsageError(
        f"--dataset {folder}: no file in these class folders counts as an image: {listed(found)}.{heic_hint(files)} "
        "Add images, or move these folders elsewhere."
    )


def _content(folder: Path, place: Path, files: Sequence[Path]) -> str:
    """What a class folder without an image has instead, in a few words."""
    path = folder / place
    if not path.exists():
        return "a link to nothing"
    if not os.access(path, os.R_OK | os.X_OK):
        return "no permission to read it"
    nothing = "a link to a folder that is there under another name" if path.is_symlink() else "empty"
    return count_by_ending(file for file in files if file.is_relative_to(place)) or nothing


def _note_unused(files: Sequence[Path], empty: Sequence[Path] = ()) -> None:
    """Say in one note what of a folder is not used."""
    parts = []
    if other := [file for file in files if not is_image(file) and len(file.parts) > 1]:
        parts.append(f"files that do not count as images: {count_by_ending(other)}")
    if direct := sum(is_image(file) and len(file.parts) == 1 for file in files):
        parts.append(f"images without a class folder: {direct:,}")
    if empty:
        parts.append(f"class folders without an image: {listed(empty)}")
    if parts:
        note(f"note: not used: {'; '.join(parts)}.{heic_hint(other)}")


def _rows(folder: Path, images: list[Path], labels: Sequence[str | None]) -> Rows:
    return Rows([folder / image for image in images], labels, [printable(str(image)) for image in images])
