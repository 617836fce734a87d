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

    Raises:
        UsageError: several of the folders have a file of one name, so it is not known which one is meant.
    """
    wanted: dict[str, set[str]] = {}
    for text in {place.relative(text) for text in texts if text}:
        wanted.setdefault(PurePosixPath(text).name, set()).add(text)
    folders: dict[str, Path] = {}
    for path in _files(place.folder):
        for text in wanted.get(path.name, ()):
            if not path.as_posix().endswith(f"/{text}"):
                continue
            folder = Path(path.as_posix()[: -len(text)])
            if folders.setdefault(text, folder) != folder:
                several = listed(_below(place, other) for other in (folders[text], folder))
                raise UsageError(
                    printable(
                        f"{source}: {brief(text)} of the column {column} is in several folders of the archives: "
                        f"{several}. Write the folder into the paths, such as {_below(place, folder)}/{brief(text)}."
                    )
                )
    if not folders:
        return None
    first, *more = sorted(set(folders.values()))
    shown = listed((_below(place, folder) for folder in (first, *more)), 5)
    note(printable(f"note: {source}: the images of the column {column} are in {shown}, below {place.folder}."))
    return replace(place, folder=first, more=tuple(more))


def _files(folder: Path) -> Iterator[Path]:
    return (Path(place, name) for place, _, names in os.walk(folder) for name in names)


def _below(place: Place, folder: Path) -> str:
    return folder.relative_to(place.folder).as_posix()
