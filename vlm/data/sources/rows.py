"""What every reader returns: the rows of each split, and what is known about the source."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from vlm.common import UsageError
from vlm.data.images import ImageSource
from vlm.data.sources.columns import Columns
from vlm.data.sources.roles import role_of

if TYPE_CHECKING:
    from vlm.data.stream import Stream

EXPECTED = (
    "Expected a hub id, a folder CLASS/IMAGE or SPLIT/CLASS/IMAGE, a CSV, JSONL or JSON file with paths and labels, "
    "or a folder written by save_to_disk."
)
NUMBERED = re.compile(r"[-_.]?\d+([-_]of[-_]\d+)?$")  # the end of the name of one of several files
HUB = "hub"  # the kind of a dataset on the hub; all other kinds are local


class Images(Protocol):
    """What `open_image` takes, by row. Can be pickled, for the processes of a DataLoader."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> ImageSource | None: ...


@dataclass
class Rows:
    """The rows of one split.

    images: what `open_image` takes; labels: as they are in the source, None if a row has none;
    names: what messages call the images; reasonings: a text about each image or None, if a column of texts was named;
    groups: what each image belongs to or None, if a column or a pattern says so.
    """

    images: Images
    labels: Sequence[object]
    names: list[str]
    reasonings: list[str | None] | None = None
    groups: list[str | None] | None = None

    def take(self, rows: Sequence[int]) -> "Rows":
        """Some of the rows, in the order given."""
        texts = None if self.reasonings is None else [self.reasonings[row] for row in rows]
        groups = None if self.groups is None else [self.groups[row] for row in rows]
        labels, names = [self.labels[row] for row in rows], [self.names[row] for row in rows]
        return Rows(Picked(self.images, rows), labels, names, texts, groups)

    def join(self, other: "Rows") -> "Rows":
        """These rows, then those of another split."""
        texts, groups = (
            _join(self, other, self.reasonings, other.reasonings),
            _join(self, other, self.groups, other.groups),
        )
        labels, names = [*self.labels, *other.labels], [*self.names, *other.names]
        return Rows(Joined(self.images, other.images), labels, names, texts, groups)


def _join(
    one: Rows, other: Rows, found: list[str | None] | None, more: list[str | None] | None
) -> list[str | None] | None:
    """What is known of the rows of two splits, None if it is known of none."""
    if found is None and more is None:
        return None
    return [*(found or [None] * len(one.names)), *(more or [None] * len(other.names))]


@dataclass(frozen=True)
class Picked:
    """Some of the images, read only when asked for."""

    images: Images
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> ImageSource | None:
        return self.images[self.rows[row]]

    def path(self, row: int) -> str | None:
        """The text in a row that names a file, if it is at hand; see `path_at`."""
        return path_at(self.images, self.rows[row])


def path_at(images: Images, row: int) -> str | None:
    """A text that is equal only for rows with the same image, such as its path; None if it is not at hand."""
    if isinstance(images, list):
        return str(images[row]) if isinstance(images[row], str | Path) else None
    path = getattr(images, "path", None)
    return path(row) if path else None


@dataclass(frozen=True)
class Joined:
    """The images of two splits, those of the second after those of the first."""

    first: Images
    second: Images

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, row: int) -> ImageSource | None:
        count = len(self.first)
        return self.first[row] if row < count else self.second[row - count]


@dataclass
class Source:
    """A dataset as read.

    kind: in words, for the user; splits: the rows by role (train, validation, test);
    split_names: what the dataset calls the split of each role; others: its splits that have no role;
    class_names: if there are any, the labels are indices into them;
    columns: None if the kind has no columns; hub_id, commit: of a dataset on the hub;
    stream: the train split if it is read during the training, of which `splits` has a sample then.
    """

    kind: str
    splits: dict[str, Rows]
    split_names: dict[str, str]
    others: list[str] = field(default_factory=list)
    class_names: list[str] | None = None
    columns: Columns | None = None
    hub_id: str | None = None
    commit: str | None = None
    stream: "Stream | None" = None

    def name_labels(self, named: tuple[list[str], Mapping[str, Sequence[object]]] | None) -> None:
        """Take class names and the labels of each split as indices into them, if there are any."""
        if named is not None:
            self.class_names = named[0]
            for role, labels in named[1].items():
                self.splits[role].labels = labels


def files_by_split(files: Iterable[Path]) -> dict[str, list[Path]]:
    """Data files by the split in their names, such as train-00001-of-00003.parquet or cifar-test-1.tar, else by folder.

    If no name is that of a split, all files are of train.
    """
    found: dict[str, list[Path]] = {}
    for path in sorted(files):
        name = NUMBERED.sub("", path.stem)
        names = (re.split(r"[-_. ]", name)[-1], path.parent.name, name)  # train_1_shot is not train
        found.setdefault(next(filter(role_of, names), name), []).append(path)
    return found if any(map(role_of, found)) else {"train": [path for some in found.values() for path in some]}


def nothing_there(name: object, found: str = "") -> UsageError:
    """The error for a place without anything that can be read.

    Args:
        found: what is there instead, as sentences.
    """
    return UsageError(f"--dataset {name}: nothing there that can be read as a dataset. {found}{EXPECTED}")
