"""Where the files are that a column of paths names: below a folder, above it, or under another beginning."""

import os
import re
import shlex
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from vlm.common import UsageError, brief, note, printable
from vlm.config import Settings
from vlm.data.finding import is_image
from vlm.data.sources.archives import is_archive, is_unpacked, unpacked

MOST_FILES = 100_000  # that are looked through for files of other cells
# How Label Studio writes paths: of files below its document root, and of uploaded files, which get a name of their own.
LOCAL = "/data/local-files/?d="
UPLOADED = re.compile(r".*/data/upload/(?:[0-9]+/)?(([0-9a-f]{8}-)?[^/]+)")


@dataclass(frozen=True)
class Place:
    """Where the files of a column of paths are.

    folder: what the paths are relative to; cut: what each of them begins with that is left out; suffix: the ending that
    is added to paths without it; given: whether the user named the folder; more: other folders, where a file is looked
    for that is not in `folder`.
    """

    folder: Path
    cut: str = ""
    suffix: str = ""
    given: bool = False
    more: tuple[Path, ...] = ()

    def file(self, text: str) -> Path:
        """The file that a text names, whether it is there or not."""
        text = self.relative(text)
        found = find_file(self.folder, text)
        if not self.more or os.path.exists(found):
            return found
        others = (find_file(folder, text) for folder in self.more)
        return next((other for other in others if os.path.exists(other)), found)

    def relative(self, text: str) -> str:
        """The path of the file that a text names, relative to the folder."""
        text = _plain(text, self.folder)
        if self.suffix and not text.lower().endswith(self.suffix.lower()):
            text += self.suffix
        if self.cut:
            text = _slashed(text).removeprefix(self.cut)
        return text

    def has(self, text: str) -> bool:
        """Whether the file that a text names is there."""
        return os.path.exists(self.file(text))


def asked_place(settings: Settings, folder: Path) -> Place:
    """Where files are looked for first: in `--image-folder`, or in the folder of the table.

    Raises:
        UsageError: there is no such folder, or an archive in its place cannot be unpacked.
    """
    suffix = settings.image_suffix or ""
    if suffix and not suffix.startswith("."):
        suffix = f".{suffix}"
    if settings.image_folder is None:
        return Place(folder, suffix=suffix)
    given = Path(settings.image_folder)
    if given.is_file() and is_archive(given):
        return Place(unpacked({given: Path()}), suffix=suffix, given=True)
    if not given.is_dir():
        near = folder / given
        cure = f"Give {shlex.quote(str(near))}" if near.is_dir() else "Name the folder that the paths are relative to"
        raise UsageError(f"--image-folder {given}: no such folder{' here' if near.is_dir() else ''}. {cure}.")
    return Place(given, suffix=suffix, given=True)


def locate(place: Place, texts: Sequence[str], tried: Sequence[str], column: str, source: str) -> Place | None:
    """Where the files of a column are. Only the files of some of its cells are looked for.

    If no file is at the place, the paths may be relative to the folder above, or to one called like the table, or
    absolute paths of another machine, whose last parts are there. What every path begins with is then left out, and a
    note says so.

    Args:
        place: where files are looked for first.
        texts: the paths of the column.
        tried: those whose files are looked for.
        source: what the column belongs to, for messages.

    Returns:
        The place; None if no file was found.
    """
    if any(map(place.has, tried)):
        return place
    tried = [_plain(text, place.folder) for text in tried]
    folders = [place.folder] if place.given else [place.folder, place.folder / Path(source).stem]
    found = next(_elsewhere(place, folders, [_plain(text, place.folder) for text in texts], tried), None)
    if found is None:
        return None
    what, shown = f"note: {source}: the paths of the column {column}", _shown(found.folder)
    if found.cut:
        note(printable(f"{what} begin with {brief(found.cut)}, which is left out; the files are in {shown}."))
    else:
        note(printable(f"{what} are relative to {shown}."))
    return found


def find_file(folder: Path, text: str) -> Path:
    """The file that a text names. If there is none: with / for \\, and in the other Unicode normal forms.

    macOS writes accents of file names as characters of their own, and tables rarely do.
    """
    path = folder / text
    if (text.isascii() and "\\" not in text) or os.path.exists(path):
        return path
    spelled = [unicodedata.normalize(form, other) for other in (text, _slashed(text)) for form in ("NFC", "NFD")]
    return next((folder / other for other in spelled if os.path.exists(folder / other)), path)


def is_of_label_studio(text: str) -> bool:
    """Whether a text is a path, or the address of a local server, as Label Studio writes them."""
    return "/data/" in text and (LOCAL in text or UPLOADED.fullmatch(text) is not None)


def _shown(folder: Path) -> Path:
    return folder if folder.parts else Path.cwd()


def _slashed(text: str) -> str:
    return text.replace("\\", "/")


def _plain(text: str, folder: Path) -> str:
    """A path as it is or, if Label Studio wrote it, that of the file."""
    if not is_of_label_studio(text):
        return text
    if LOCAL in text:
        return unquote(text.split(LOCAL, 1)[1])
    if match := UPLOADED.fullmatch(text):
        name = unquote(match[1])
        names = (text.lstrip("/"), name, name.removeprefix(match[2] or ""))
        return next((name for name in names if os.path.exists(folder / name)), name)
    return text


def _elsewhere(place: Place, folders: Sequence[Path], texts: Sequence[str], tried: Sequence[str]) -> Iterator[Place]:
    """Other places where one of the files is, and that no path contradicts; the likely ones first."""
    above = [] if place.given else [place.folder.resolve().parent]
    for text in tried:
        parts = _slashed(text).split("/")
        for folder in [*folders, *above]:
            shortest = 2 if folder in above else 1  # parts of a path; a mere name is too little above the table
            for left_out in range(len(parts) - shortest + 1):
                cut = "".join(f"{part}/" for part in parts[:left_out])
                found = replace(place, folder=folder, cut=cut)
                if found.has(text) and all(_slashed(other).startswith(cut) for other in texts if other):
                    yield found


def say_why(place: Place, tried: Sequence[str], column: str, source: str) -> None:
    """Raise the UsageError that names the flags with which the files are found, if images of these names are there.

    Args:
        tried, column, source: see `locate`.
    """
    tried = [_plain(text, place.folder) for text in tried]
    what = f"{source}: no file {brief(place.relative(tried[0]))} of the column {column} in {_shown(place.folder)}"
    name = PurePosixPath(_slashed(tried[0])).name
    for file in _image_files(place.folder):
        if file.name != name and file.stem != name:
            continue
        there = _place_with(place, file, tried[0])
        if len(tried) > 1 and not any(map(there.has, tried[1:])):
            continue
        # What is unpacked is looked through, so that its folder need not be given (packed.py).
        found_anyway = there.folder == place.folder or is_unpacked(place.folder)
        flags = [] if found_anyway else ["--image-folder", shlex.quote(str(there.folder))]
        flags += ["--image-suffix", there.suffix] if there.suffix != place.suffix else []
        instead = f" instead of {place.suffix}" if place.suffix and there.suffix != place.suffix else ""
        found = brief(file.relative_to(place.folder).as_posix())
        raise UsageError(f"{what}, but there is {found}. {'Give' if instead else 'Add'}: {' '.join(flags)}{instead}")
    if "\\" in tried[0]:
        raise UsageError(f"{what}: it is a Windows path. Name the folder that holds the images with --image-folder.")


def _place_with(place: Place, file: Path, text: str) -> Place:
    """The place at which a text names a file, whose name is the last part of the text, or that without its ending."""
    *parents, name = _slashed(text).split("/")
    same = 0  # folders that both end with
    while same < min(len(parents), len(file.parts) - 1) and parents[-1 - same] == file.parts[-2 - same]:
        same += 1
    cut = "".join(f"{part}/" for part in parents[: len(parents) - same])
    return replace(place, folder=file.parents[same], cut=cut, suffix=place.suffix if file.name == name else file.suffix)


def _image_files(folder: Path) -> Iterator[Path]:
    files = (Path(place, name) for place, _, names in os.walk(folder) for name in sorted(names))
    return filter(is_image, islice(files, MOST_FILES))
