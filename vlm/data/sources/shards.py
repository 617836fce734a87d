"""WebDataset: tar files with an image and its label under one key, such as 0001.jpg and 0001.cls. Read in place.

The places of all images are found once, from the headers of the tar files; an image is read when it is asked for.
"""

import json
import os
import re
import tarfile
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, NamedTuple

from vlm.common import UsageError, brief, listed, note, printable, reason, with_bar
from vlm.config import Settings
from vlm.data.finding import is_hidden, is_image
from vlm.data.images import UnreadableImage
from vlm.data.sources.archives import whole_tar
from vlm.data.sources.columns import LABEL_COLUMNS, Columns
from vlm.data.sources.rows import Rows, Source, role_of, sort_splits

LABELS = (".cls", ".txt", ".json")  # the best first
LARGEST_LABEL = 1 << 20  # bytes
LOOKED_AT = 50  # files of a tar file, to tell whether it is a shard
MOST_OPEN = 32  # tar files at once
SHARD = re.compile(r"^(?P<name>.*?)[-_.]?(?P<number>\d+([-_]of[-_]\d+)?)?$", re.IGNORECASE)


class Entry(NamedTuple):
    """Where a file of a tar file is: its key, its ending with the dot, and its place in bytes."""

    key: str
    ending: str
    offset: int
    size: int


def is_shard(path: Path) -> bool:
    """Whether a file is a tar file of WebDataset: next to an image lies a label of the same key."""
    if path.suffix.lower() != ".tar":
        return False
    try:
        with path.open("rb") as file:
            entries = list(islice(_entries(file), LOOKED_AT))
    except (OSError, tarfile.TarError):
        return False
    images = {entry.key for entry in entries if is_image(Path(f"x{entry.ending}"))}
    labels = {entry.ending for entry in entries if entry.ending in LABELS and entry.key in images}
    # Text files in folders of classes are about something else, such as boxes.
    return ".cls" in labels or (bool(labels) and len({key.rpartition("/")[0] for key in images}) == 1)


def read_shards(paths: Sequence[Path], settings: Settings) -> Source:
    """Read tar files of WebDataset. Their split is that in their names, as train-0001.tar, or of their folders.

    Raises:
        UsageError: one is damaged, or has images without a label of the kind that the others have.
    """
    by_split: dict[str, list[Path]] = {}
    for path in sorted(paths):
        by_split.setdefault(_split_of(path), []).append(path)
    roles, others = sort_splits(by_split)
    if not roles:  # shards of one split, however it is called
        by_split, roles, others = (
            {"train": [path for some in by_split.values() for path in some]},
            {"train": "train"},
            [],
        )
    if settings.image_column or settings.reasoning_column:
        raise UsageError(
            "--image-column and --reasoning-column: tar files of WebDataset have no such columns. Leave them out; "
            "--label-column may name an ending, such as cls, or a key of the JSON files."
        )
    splits = {role: _rows(by_split[name], name, settings) for role, name in roles.items()}
    columns = Columns("the images", settings.label_column or f"the labels ({listed(LABELS)})", None)
    return Source("WebDataset", splits, roles, others, columns=columns)


def _split_of(path: Path) -> str:
    found = SHARD.match(path.stem)
    name = found["name"] if found else ""
    words = [word for word in re.split(r"[-_. ]", name) if role_of(word)]
    if not role_of(name) and len(words) == 1:  # imagenet-val-0001
        return words[0]
    return name if role_of(name) or not role_of(path.parent.name) else path.parent.name


def _rows(paths: Sequence[Path], split: str, settings: Settings) -> Rows:
    """The images of some shards with their labels."""
    images = ShardImages([str(path) for path in paths])
    labels: list[object] = []
    names: list[str] = []
    unlabeled = without = 0
    for number, path in enumerate(with_bar(iter(paths), len(paths), f"listing {split}") if len(paths) > 1 else paths):
        for key, entries, file in _samples(path):
            image = _image(path, key, entries)
            if image is None:
                without += 1
                continue
            label = _label(path, file, entries, settings.label_column)
            unlabeled += label is None
            images.add(number, image)
            labels.append(label)
            names.append(printable(f"{path.name}:{key}{image.ending}"))
    if without:
        note(f"note: not used: {without:,} keys of {split} without an image.")
    if not labels:
        raise UsageError(f"{listed(map(str, paths), 3)}: no image in these tar files. Expected files such as 0001.jpg.")
    if unlabeled == len(labels) and split == "train":
        raise UsageError(
            f"{paths[0]}: no image has a label. Expected 0001.cls or 0001.txt next to 0001.jpg, or 0001.json with one "
            f"of the keys {listed(LABEL_COLUMNS)} (or the one that --label-column names)."
        )
    return Rows(images, _whole_numbers(labels), names)


def _image(path: Path, key: str, entries: Sequence[Entry]) -> Entry | None:
    """The image of a sample, None if it has none: of 1.jpg and 1.depth.png the one with the shorter ending."""
    images = [entry for entry in entries if is_image(Path(f"x{entry.ending}"))]
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
        raise UsageError(f"{path} is damaged ({reason(error)}). Copy or download it again.") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({reason(error)}). Allow to read it.") from error


def _entries(file: BinaryIO) -> Iterator[Entry]:
    """The regular files of an uncompressed tar file, in their order.

    Raises:
        ReadError: it is damaged, or was cut off.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for info in whole_tar(tar, size, keep=False):
            folder, _, name = info.name.rpartition("/")
            stem, dot, ending = name.partition(".")
            if info.isreg() and stem and not is_hidden(name):
                key = f"{folder}/{stem}" if folder else stem
                yield Entry(key, f"{dot}{ending}".lower(), info.offset_data, info.size)


def _label(path: Path, file: BinaryIO, entries: Sequence[Entry], column: str | None) -> object:
    """The label of a sample, None if it has none."""
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
                return text or None
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}: {brief(entry.key)}{ending} is not a label ({reason(error)}).") from error
        if not isinstance(found, Mapping):
            return found
        names = [column] if column else LABEL_COLUMNS
        return next((found[name] for name in names if name in found), None)
    return None


def _whole_numbers(labels: list[object]) -> list[object]:
    """The labels as numbers, if all are whole numbers as text; else as they are."""
    texts = [label for label in labels if label is not None]
    if all(isinstance(label, str) and label.isdecimal() for label in texts):
        return [None if label is None else int(str(label)) for label in labels]
    return labels


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
