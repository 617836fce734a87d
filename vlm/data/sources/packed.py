"""Tables whose images are in archives: in those that lie next to the table, or in the archive that it came with."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from vlm.common import UsageError, brief, listed, note, printable
from vlm.data.sources.archives import has_any, is_archive, is_unpacked, stem_of, unpacked
from vlm.data.sources.places import Place


def packed_place(place: Place, texts: Sequence[str]) -> Place | None:
    """The folder with the content of the archives next to a table in which images of these names are.

    Args:
        place: where the files of the table were looked for.
        texts: the paths of the column.

    Returns:
        The same place if it is such a folder; None if there are no such archives.

    Raises:
        UsageError: an archive cannot be read or unpacked.
    """
    if is_unpacked(place.folder):
        return place
    if not place.folder.is_dir():
        return None
    names = {PurePosixPath(place.relative(text)).name for text in texts if text}
    archives = [path for path in sorted(place.folder.iterdir()) if path.is_file() and is_archive(path)]
    found = {path: Path(stem_of(path)) for path in archives if has_any(path, names)}
    return replace(place, folder=unpacked(found)) if found else None


def by_names(place: Place, texts: Sequence[str], column: str, source: str) -> Place | None:
    """The folders below an unpacked one that the paths of a column are relative to; a note names them.

    A folder that is called like the table comes first, as the images of train.csv are those in train/.

    Raises:
        UsageError: several of the folders have a file of one name, so it is not known which one is meant.
    """
    wanted: dict[str, set[str]] = {}
    for text in {place.relative(text) for text in texts if text}:
        wanted.setdefault(PurePosixPath(text).name, set()).add(text)
    folders: dict[str, set[Path]] = {}
    for path in map(Path.as_posix, _files(place.folder)):
        for text in wanted.get(path.rpartition("/")[2], ()):
            if path.endswith(f"/{text}"):
                folders.setdefault(text, set()).add(Path(path[: -len(text)]))
    if not folders:
        return None
    every = set.union(*folders.values())
    alike = {folder for folder in every if folder.name == Path(source).stem}
    first = alike if len(alike) == 1 else set()
    for text, found in folders.items():
        if len(found) > 1 and not found & first:
            several = sorted(_below(place, folder) for folder in found)
            raise UsageError(
                printable(
                    f"{source}: {brief(text)} of the column {column} is in several folders of the archives: "
                    f"{listed(several)}. Write the folder into the paths, such as {several[0]}/{brief(text)}."
                )
            )
    used = sorted(set.union(*(found & first or found for found in folders.values())), key=lambda f: (f not in first, f))
    shown = listed((_below(place, folder) for folder in used), 5)
    note(printable(f"note: {source}: the images of the column {column} are in {shown}, below {place.folder}."))
    return replace(place, folder=used[0], more=tuple(used[1:]))


def _files(folder: Path) -> Iterator[Path]:
    return (Path(place, name) for place, _, names in os.walk(folder) for name in names)


def _below(place: Place, folder: Path) -> str:
    return folder.relative_to(place.folder).as_posix()
