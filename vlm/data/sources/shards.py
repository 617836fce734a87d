"""WebDataset: tar files with an image and its label under one key, such as 0001.jpg and 0001.cls. Read in place.

The places of all images are found once, from the headers of the tar files; an image is read when it is asked for.
"""

import json
import os
import tarfile
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, Literal, NamedTuple, Self

from vlm.common import Bar, UsageError, brief, listed, note, printable, reason
from vlm.config import Settings
from vlm.data.finding import is_hidden
from vlm.data.formats import IMAGE_ENDINGS
from vlm.data.images import UnreadableImage
from vlm.data.sources.archives import TAR, whole_tar
from vlm.data.sources.columns import LABEL_COLUMNS, Columns
from vlm.data.sources.foreign import AGAIN
from vlm.data.sources.labels import text_column, use_names
from vlm.data.sources.roles import role_of, sort_splits
from vlm.data.sources.rows import Rows, Source, files_by_split

LABELS = (".cls", ".txt", ".json")  # the best first
LARGEST_LABEL = 1 << 20  # bytes
LOOKED_AT = 50  # files of a tar file, to tell whether it is a shard
MOST_OPEN = 32  # tar files at once


class Entry(NamedTuple):
    """Where a file of a tar file is: its key, its ending with the dot, and its place in bytes."""

    key: str
    ending: str
    offset: int
    size: int

    @property
    def is_image(self) -> bool:
        return f".{self.ending.rpartition('.')[2]}" in IMAGE_ENDINGS

    @property
    def folder(self) -> str:
        return self.key.rpartition("/")[0]

    @property
    def end(self) -> int:
        return self.offset + self.size


class Named(NamedTuple):
    """The name of a label in a JSON file, and the keys of both."""

    text: str
    keys: tuple[str, str]


class Header(tarfile.TarInfo):
    """The header of a file in a tar file; that of a usual file is read several times as fast as tarfile does it."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> Self:
        name, prefix = buf[:100].partition(b"\0")[0], buf[345:500].partition(b"\0")[0]
        try:
            size, checksum = int(buf[124:136].strip(b" \0"), 8), int(buf[148:156].strip(b" \0"), 8)
        except ValueError:
            return super().frombuf(buf, encoding, errors)
        usual = len(buf) == tarfile.BLOCKSIZE and buf[156:157] in (tarfile.REGTYPE, tarfile.AREGTYPE)
        # The checksum counts its own eight bytes as blanks.
        if not usual or name.endswith(b"/") or sum(buf) - sum(buf[148:156]) + 8 * ord(" ") != checksum:
            return super().frombuf(buf, encoding, errors)
        header = cls((prefix + b"/" + name if prefix else name).decode(encoding, errors))
        header.size = size
        return header


def is_shard(path: Path) -> bool:
    """Whether a file is a tar file of WebDataset: next to an image lies a label of the same key.

    Texts and JSON next to images in folders of classes are no labels, but about something else, such as boxes.
    """
    if not path.name.lower().endswith(TAR):
        return False
    try:
        with path.open("rb") as file:
            entries = _entries(file, "r:*")
            first = list(islice(entries, LOOKED_AT))
            images = {entry.key for entry in first if entry.is_image}
            labels = {entry.ending for entry in first if entry.ending in LABELS and entry.key in images}
            if ".cls" in labels or not labels:
                return bool(labels)
            folders = {entry.folder for entry in first if entry.is_image}
            return folders == {""} or all(entry.folder in folders for entry in entries) and len(folders) == 1
    except Exception:  # each decompressor has its own; what is wrong is said when the file is read
        return False


def read_shards(paths: Sequence[Path], settings: Settings) -> Source:
    """Read tar files of WebDataset. Their split is that in their names, as train-0001.tar, or of their folders.

    Raises:
        UsageError: one is compressed or damaged, or no image has a label.
    """
    if packed := [path for path in paths if path.suffix.lower() != ".tar"]:
        raise UsageError(
            f"{packed[0]}: a tar file of WebDataset that is compressed, so its images cannot be read in place. "
            "Decompress it (gunzip, bunzip2 or unxz), and give the .tar file."
        )
    if settings.image_column or settings.reasoning_column:
        raise UsageError(
            "--image-column and --reasoning-column: tar files of WebDataset have no such columns. Leave them out; "
            "--label-column may name an ending, such as cls, or a key of the JSON files."
        )
    by_split = files_by_split(paths)
    roles, others = sort_splits(by_split)
    read = {role: _rows(by_split[name], name, settings) for role, name in roles.items()}
    splits = {role: rows for role, (rows, _) in read.items()}
    columns = Columns("the images", settings.label_column or f"the labels ({listed(LABELS)})", None)
    source = Source("WebDataset", splits, roles, others, columns=columns)
    if keys := next((label.keys for _, texts in read.values() for label in texts if label), None):
        labels = {role: rows.labels for role, rows in splits.items()}
        texts = {role: [label and label.text for label in found] for role, (_, found) in read.items()}
        source.name_labels(use_names(labels, texts, *keys))
    return source


def _rows(paths: Sequence[Path], split: str, settings: Settings) -> tuple[Rows, list[Named | None]]:
    """The images of some shards with their labels, and the names next to these."""
    images, column = ShardImages([str(path) for path in paths]), settings.label_column
    labels: list[object] = []
    texts: list[Named | None] = []
    seen: dict[Named | None, Named | None] = {}  # equal ones are kept once
    names: list[str] = []
    without = several = 0
    with Bar(sum(path.stat().st_size for path in paths), f"listing {split}", unit="bytes") as bar:
        for number, path in enumerate(paths):
            start = 0
            for key, entries, file in _samples(path):
                image = _image(path, key, entries)
                if image:
                    images.add(number, image)
                    label, text = _label(path, file, entries, column)
                    labels.append(label)
                    texts.append(seen.setdefault(text, text))
                    names.append(printable(f"{path.name}:{key}{image.ending}"))
                without += image is None
                several += sum(entry.is_image for entry in entries) > 1
                bar.update(entries[-1].end - start)
                start = entries[-1].end
    _check_rows(paths, split, labels, column, settings.labels_needed)
    if without:
        note(f"note: not used: {without:,} keys of {split} without an image.")
    if several:
        note(f"note: not used: further images of {several:,} keys of {split}, such as 1.mask.png of 1.jpg.")
    return Rows(images, labels, names), texts


def _check_rows(paths: Sequence[Path], split: str, labels: list[object], column: str | None, needed: bool) -> None:
    if not labels:
        raise UsageError(f"{listed(map(str, paths), 3)}: no image in these tar files. Expected files such as 0001.jpg.")
    if not needed or role_of(split) != "train" or any(label is not None for label in labels):
        return
    if column:
        raise UsageError(
            f"--label-column {column}: no file of that ending lies next to an image of {paths[0]}, and no .json has "
            "that key."
        )
    raise UsageError(
        f"{paths[0]}: no image has a label. Expected 0001.cls or 0001.txt right after or before 0001.jpg, or 0001.json "
        f"with one of the keys {listed(LABEL_COLUMNS)} (or the one that --label-column names)."
    )


def _image(path: Path, key: str, entries: Sequence[Entry]) -> Entry | None:
    """The image of a sample, None if it has none: of 1.jpg and 1.depth.png the one with the shorter ending."""
    images = [entry for entry in entries if entry.is_image]
    plain = [entry for entry in images if entry.ending.count(".") == 1] or images
    if len(plain) > 1:
        endings = listed(entry.ending for entry in plain)
        raise UsageError(f"{path}: {brief(key)} has {len(plain)} images ({endings}). Expected one under each key.")
    return next(iter(plain), None)


def _samples(path: Path) -> Iterator[tuple[str, list[Entry], BinaryIO]]:
    """The files of a shard by their key, and the shard itself, opened; those of a key come one after the other."""
    try:
        with path.open("rb") as file:
            for key, entries in groupby(_entries(file), lambda entry: entry.key):
                yield key, list(entries), file
    except tarfile.TarError as error:
        raise UsageError(f"{path} is damaged ({reason(error)}). {AGAIN}") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({reason(error)}). Allow to read it.") from error


def _entries(file: BinaryIO, mode: Literal["r:", "r:*"] = "r:") -> Iterator[Entry]:
    """The regular files of a tar file, in their order.

    Args:
        mode: "r:" reads only one that is not compressed.

    Raises:
        ReadError: it is damaged, or was cut off.
    """
    size = file.seek(0, os.SEEK_END) if mode == "r:" else None
    file.seek(0)
    with tarfile.open(fileobj=file, mode=mode, tarinfo=Header) as tar:
        for info in whole_tar(tar, size, keep=False):
            folder, _, name = info.name.rpartition("/")
            stem, dot, ending = name.partition(".")
            if info.isreg() and stem and not is_hidden(name):
                key = f"{folder}/{stem}" if folder else stem
                yield Entry(key, f"{dot}{ending}".lower(), info.offset_data, info.size)


def _label(path: Path, file: BinaryIO, entries: Sequence[Entry], column: str | None) -> tuple[object, Named | None]:
    """The label of a sample, None if it has none; and its name, if the JSON has one next to it."""
    by_ending = {entry.ending: entry for entry in entries}
    named = f".{column.lower().lstrip('.')}" if column else ""
    wanted = LABELS if not column else [named] if named in by_ending else [".json"]
    for ending in wanted:
        entry = by_ending.get(ending)
        if entry is None or entry.size > LARGEST_LABEL:
            continue
        file.seek(entry.offset)
        try:
            text = file.read(entry.size).decode("utf-8-sig").strip()
            if ending != ".json" or named == ".json":
                return text or None, None
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}: {brief(entry.key)}{ending} is not a label ({reason(error)}).") from error
        if not isinstance(found, Mapping):
            return found, None
        names = [column] if column else LABEL_COLUMNS
        key = next((name for name in names if name in found), None)
        text_key = key and text_column(key, list(found))
        if key is None or text_key is None or not isinstance(found[text_key], str):
            return key and found[key], None
        return found[key], Named(found[text_key], (key, text_key))
    return None, None


class ShardImages:
    """The images in tar files, read when they are asked for: 24 bytes of memory an image. Can be pickled.

    Args:
        paths: the tar files.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = list(paths)
        self._shards, self._offsets, self._sizes = array("l"), array("q"), array("q")
        self._open: OrderedDict[int, int] = OrderedDict()  # file descriptors by shard, those last used at the end
        self._lock = Lock()

    def add(self, shard: int, entry: Entry) -> None:
        """Append an image."""
        self._shards.append(shard)
        self._offsets.append(entry.offset)
        self._sizes.append(entry.size)

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, row: int) -> bytes:
        """Raises UnreadableImage if the tar file cannot be read."""
        offset, size, shard = self._offsets[row], self._sizes[row], self._shards[row]
        try:
            with self._lock:  # so that no other thread closes the file meanwhile
                file = self._file(shard)
                if hasattr(os, "pread"):  # processes that were forked share the position in a file
                    return os.pread(file, size, offset)
                os.lseek(file, offset, os.SEEK_SET)
                return os.read(file, size)
        except OSError as error:
            raise UnreadableImage(printable(f"{self._paths[shard]}: {reason(error)}")) from error

    def _file(self, shard: int) -> int:
        if shard not in self._open:
            while len(self._open) >= MOST_OPEN:
                os.close(self._open.popitem(last=False)[1])
            self._open[shard] = os.open(self._paths[shard], os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._open.move_to_end(shard)
        return self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=Lock())

    def __del__(self) -> None:
        for file in self._open.values():
            os.close(file)
