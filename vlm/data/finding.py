"""Finds the images in folders, and counts what is no image by its ending."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from vlm.common import UsageError, listed, note, printable, reason
from vlm.data.formats import FORMATS, HEIF, IMAGE_ENDINGS, UNREAD_ENDINGS

CLUTTER = {"Thumbs.db", "desktop.ini", "__MACOSX"}  # what Windows makes in every folder, and macOS in archives
MOST_ENDINGS = 6


def find_images(paths: Sequence[str | Path]) -> list[str]:
    """The images at some paths, each once: files as they are given, and of folders all images anywhere below them.

    The images of a folder are sorted by path; hidden ones are left out, and a note counts those in formats that are
    not read. If only some of the paths do not exist, they are kept, so that each is reported as an image that cannot be
    read.

    Raises:
        UsageError: none of the paths exists, or a folder has no image.
    """
    found: list[str] = []
    if not any(map(os.path.exists, paths)):
        others = ", and neither do the other paths" if len(paths) > 1 else ""
        raise UsageError(f"{paths[0]} does not exist{others}. Expected an image file or a folder of images.")
    for path in map(Path, paths):
        found += _images_below(path) if path.is_dir() else [str(path)]
    return list(dict.fromkeys(found)) if len(paths) > 1 else found


def _images_below(folder: Path) -> list[str]:
    names = _visible_names(folder)
    other = [Path(name) for name in names if not is_image(name)]
    images = [str(folder / name) for name in names if is_image(name)]
    if not images:
        there = f" but {count_by_ending(other)}.{heic_hint(other)}" if other else "."
        endings = " ".join(sorted(IMAGE_ENDINGS))
        raise UsageError(f"{folder} has no image{there} Files with these endings count as images: {endings}.")
    if unread := [file for file in other if file.suffix.lower() in UNREAD_ENDINGS]:
        there = f"{count_by_ending(unread)}.{heic_hint(unread)}"
        note(f"note: {printable(str(folder))}: not used, as these files do not count as images: {there}")
    return images


def is_image(path: str | Path) -> bool:
    """Whether a file is an image by its ending."""
    return os.path.splitext(path)[1].lower() in IMAGE_ENDINGS


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is not for people."""
    return name.startswith(".") or name in CLUTTER


def visible_files(folder: Path) -> list[Path]:
    """All files below a folder that are not hidden, relative to it, sorted.

    Links to folders are followed, but each folder is entered once, so links in a circle do no harm. If a folder can be
    reached by a link and without one, its files have the path without. A folder that cannot be read is named in a note.
    """
    return [Path(name) for name in _visible_names(folder)]


def _visible_names(folder: Path) -> list[str]:
    """The paths of `visible_files` as texts: a million of them take a tenth of the memory."""
    files: list[str] = []
    entered: set[tuple[int, int]] = set()
    starts = [str(folder)]
    for start in starts:  # links that are found are added at the end, so folders come before links to them
        for place, folders, names in os.walk(start, onerror=_note_closed):
            status = os.stat(place)
            if (status.st_dev, status.st_ino) in entered:
                folders.clear()
                continue
            entered.add((status.st_dev, status.st_ino))
            folders[:] = sorted(name for name in folders if not is_hidden(name))
            starts += [path for name in folders if os.path.islink(path := os.path.join(place, name))]
            below = place.removeprefix(str(folder)).lstrip(os.sep)
            files += [os.path.join(below, name) for name in names if not is_hidden(name)]
    return sorted(files, key=lambda name: name.replace(os.sep, "\0"))  # by folder, as paths are sorted


def _note_closed(error: OSError) -> None:
    note(printable(f"{error.filename} is left out: {reason(error)}"))


def count_by_ending(files: Iterable[Path]) -> str:
    """How many files there are of each ending, the most frequent first."""
    counts = Counter(file.suffix.lower() or "without an ending" for file in files).most_common()
    return listed((f"{count:,} {ending}" for ending, count in counts), MOST_ENDINGS)


def heic_hint(files: Sequence[Path]) -> str:
    """How HEIC images can be read, if some do not count as images on this machine."""
    unread = any(file.suffix.lower() in FORMATS[HEIF] and not is_image(file) for file in files)
    return " HEIC images are read if pillow-heif is installed: pip install pillow-heif." if unread else ""
