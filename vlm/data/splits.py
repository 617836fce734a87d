"""The images of one split (`Split`), and a dataset that is ready for training (`Data`)."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from vlm.data.images import open_image
from vlm.data.known import Found, KnownImages, stamp_of
from vlm.data.sample import Sample
from vlm.data.sources.rows import Rows, path_at

if TYPE_CHECKING:
    from vlm.data.stream import Stream

PARTS_AT_ONCE = 10_000  # of what a digest is of
MOST_STAMPS = 10_000  # that a split remembers
ROLES = ("train", "validation", "test")
LEAKS = (("test", "train"), ("validation", "train"), ("test", "validation"))  # what would make an accuracy too high


class Check(NamedTuple):
    """What is known of an image that was decoded: width and height in pixels, or its name and why it cannot be read;
    look: its `perceptual_hash`, None if it has none."""

    size: tuple[int, int] = (0, 0)
    fault: str | None = None
    look: bytes | None = None

    @property
    def edge(self) -> int:
        """The longest edge in pixels."""
        return max(self.size)


class NearPair(NamedTuple):
    """An image of the split `role` at `position`, and the one of the split `other` that it looks most like.

    distance: the number of bits in which their hashes differ.
    """

    role: str
    position: int
    other: str
    other_position: int
    distance: int

    @property
    def kind(self) -> str:
        """The key in `overlap` of `results.json`."""
        return near_kind(self.role, self.other)


def near_kind(role: str, other: str) -> str:
    """What `overlap` of `results.json` calls the images of a split that look almost like one in another."""
    return f"{role}_near_{other}"


class Split:
    """Labeled images, decoded each time one is looked at. Can be pickled, for the processes of a DataLoader.

    Args:
        rows: where the images, names and reasonings are.
        indices: the rows that belong to the split, in order.
        labels: the class number of each.
        keys: the `image_key` of each, None if it is not known.
        checks: the `Check` of each, None if it was not decoded.

    Attributes:
        labels: the class numbers, without decoding.
        keys: the `image_key` of each image, None if it is not known.
        checks: the `Check` of each image, None if it was not decoded.
        drawn: whether images are drawn from other ones each time, as augmented views are.
    """

    drawn = False

    def __init__(
        self,
        rows: Rows,
        indices: Sequence[int] | np.ndarray,
        labels: Sequence[int],
        keys: Sequence[str | None] | None = None,
        checks: Sequence[Check | None] | None = None,
    ) -> None:
        self._rows = rows
        self._indices = np.asarray(indices, dtype=np.int64)  # a million as a list would take four times as much
        self.labels = list(labels)
        self.keys = list(keys or [None] * len(self._indices))
        self.checks = list(checks or [None] * len(self._indices))
        self._stamps: dict[str, bytes | None] = {}

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, i: int) -> Sample:
        row, check = int(self._indices[i]), self.checks[i]
        name, text, fault = self._rows.names[row], self._reasoning(row), check and check.fault
        return Sample(partial(self._open, row), self.labels[i], name, text, self.keys[i], fault)

    def _open(self, row: int) -> Image.Image:
        return open_image(self._rows.images[row], self._rows.names[row])

    def _reasoning(self, row: int) -> str | None:
        return self._rows.reasonings[row] if self._rows.reasonings else None

    def stamp(self, i: int) -> bytes | None:
        """The `stamp_of` what the image at a position is opened from. Of equal paths, one file is looked at."""
        row = int(self._indices[i])
        path = path_at(self._rows.images, row)
        if path is None:
            return stamp_of(self._rows.images, row)
        if path not in self._stamps:
            if len(self._stamps) >= MOST_STAMPS:
                self._stamps.clear()
            self._stamps[path] = stamp_of(self._rows.images, row)
        return self._stamps[path]

    def remember(self, i: int, found: Found) -> None:
        """Take over what the image at a position told when it was decoded."""
        self.keys[i], self.checks[i] = found.key, Check(found.size, look=found.look)

    def leave_out(self, i: int, fault: str) -> None:
        """Remember that the image at a position cannot be read, and why."""
        self.keys[i], self.checks[i] = None, Check(fault=fault)

    @property
    def faults(self) -> dict[int, str]:
        """The positions of images that are known to be unreadable, with the reasons."""
        return {i: check.fault for i, check in enumerate(self.checks) if check and check.fault}

    @property
    def readable(self) -> list[int]:
        """The positions of the images that are not known to be unreadable."""
        return [i for i, check in enumerate(self.checks) if not (check and check.fault)]

    @property
    def example(self) -> Sample:
        """The first image that was decoded; the first one, if none was."""
        return self[next((i for i, check in enumerate(self.checks) if check and not check.fault), 0)]

    @property
    def names(self) -> list[str]:
        """What messages call the images, in order."""
        return [self._rows.names[row] for row in self._indices.tolist()]

    @property
    def reasonings(self) -> list[str | None]:
        """The texts about the images, in order; None if an image has none."""
        return [self._reasoning(row) for row in self._indices.tolist()]

    @property
    def groups(self) -> list[str | None]:
        """What the images belong to, in order; None if an image belongs to no group."""
        groups = self._rows.groups
        return [None] * len(self) if groups is None else [groups[row] for row in self._indices.tolist()]

    @property
    def source_rows(self) -> list[int]:
        """The row of each image in its source, in order."""
        return self._indices.tolist()

    def groups_at(self, i: int) -> str | None:
        """What the image at a position belongs to; None if it belongs to no group."""
        return self._rows.groups[self._indices[i]] if self._rows.groups else None

    @property
    def has_groups(self) -> bool:
        """Whether a column or a pattern says what belongs together."""
        return self._rows.groups is not None

    def take(self, positions: Sequence[int]) -> "Split":
        """The samples at these positions of the split, in the order of the positions."""
        return Split(
            self._rows,
            self._indices[np.asarray(positions, dtype=np.int64)],
            [self.labels[i] for i in positions],
            [self.keys[i] for i in positions],
            [self.checks[i] for i in positions],
        )


@dataclass
class Data:
    """A dataset that is ready for training.

    edge: 95% of the training images have no edge longer than this, in pixels;
    summary: rows of the table "what was detected"; skipped: each unreadable image with the reason;
    source: what the metadata of the model say about the data, as JSON values; cut: the splits that were cut from train;
    overlap: the numbers of equal images in and between the splits, and of near-duplicates between them, as
    `results.json` has them; near: the near-duplicates, as `find_near` has them;
    stream: the train split if it is read during the training: `train` is a sample of it then;
    checked: whether all images were decoded; if not, unreadable ones are found while they are used (unchecked.py);
    known: what earlier runs found about the images of a large dataset.
    """

    train: Split
    validation: Split
    test: Split
    class_names: list[str]
    edge: int
    summary: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    source: dict[str, Any] = field(default_factory=dict)
    overlap: dict[str, int] = field(default_factory=dict)
    near: list[NearPair] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    stream: "Stream | None" = None
    checked: bool = True
    known: KnownImages | None = None

    @property
    def fingerprint(self) -> dict[str, str]:
        """Digests (SHA-256, in hex) by what they are of: the class names, and of each split the labels, the images and
        the reasonings, in order. A resumed run must have the same ones.

        If not all images were decoded, the names take the place of the images: which were depends on earlier runs.
        """
        parts: dict[str, Sequence[object]] = {"class names": self.class_names}
        for role, split in zip(ROLES, (self.train, self.validation, self.test), strict=True):
            parts |= {
                f"labels of {role}": split.labels,
                f"images of {role}": split.keys if self.checked else split.names,
            }
            parts |= {f"reasonings of {role}": split.reasonings}
        return {name: _digest(part) for name, part in parts.items()}


def _digest(part: Sequence[object]) -> str:
    """SHA-256 of a list as JSON, of which only a piece is made at a time."""
    digest = hashlib.sha256(b"[")
    for start in range(0, len(part), PARTS_AT_ONCE):
        piece = json.dumps(list(part[start : start + PARTS_AT_ONCE]))[1:-1]
        digest.update(f"{', ' if start else ''}{piece}".encode())
    digest.update(b"]")
    return digest.hexdigest()
