"""data.html: what a dataset looks like before anything is trained on it (`--show-data`). It needs no model."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from vlm.common import with_bar
from vlm.data import ROLES, Data, Split
from vlm.report.cards import Place, Thumbnail, fold_text, near_pairs, thumbnail
from vlm.report.templates import render, write_page

TEMPLATE = "data_page.html.jinja"
MARK = "a page of --show-data"  # in the head of the page, by which it is known again
EDGE = 96  # pixels of a thumbnail's longer side
MOST_THUMBNAILS = 1200  # of the sheets of all classes, about 4 MB
MOST_OF_A_CLASS = 12
SHARES = {"train": 0.5, "validation": 0.25, "test": 0.25}  # of a class's thumbnails
MOST_CLASSES = 1000  # with a sheet and a row in the table
MOST_SIZES, MOST_COPIES, MOST_LEFT_OUT = 10, 24, 100
MOST_AUGMENTED, MOST_VIEWS = 6, 6  # images, and views of each


@dataclass(frozen=True)
class Picture:
    """One image of the page. place: its split and class, in words."""

    image: Thumbnail | None
    name: str
    place: str


@dataclass(frozen=True)
class Sheet:
    """A class: counts of its images by split, and some of them by split."""

    name: str
    readable: str | None
    counts: dict[str, int]
    pictures: dict[str, list[Picture]]


@dataclass(frozen=True)
class Sizes:
    """Widths and heights of the images that were decoded.

    edges: images by their longest edge, as (at most so many pixels, count); common: the most frequent (width, height)
    with their counts; smallest, largest: by their number of pixels, with (width, height).
    """

    known: int
    edges: list[tuple[int, int]]
    common: list[tuple[tuple[int, int], int]]
    smallest: tuple[Picture, tuple[int, int]]
    largest: tuple[Picture, tuple[int, int]]


@dataclass
class DataContent:
    """All that the page shows; see `write_data_page`.

    readable_names: class name -> the other name that the model is shown; views: of a training image, with itself;
    train_in: an epoch -> the training images as it sees them, if they are augmented.
    """

    data: Data
    dataset: str
    seed: int = 0
    readable_names: Mapping[str, str] = field(default_factory=dict)
    views: int = 1
    train_in: Callable[[int], Split] | None = None

    @property
    def title(self) -> str:
        return f"The images of {self.dataset}"

    @property
    def subtitle(self) -> list[str]:
        counts = [f"{len(split):,} {role}" for role, split in self.splits.items()]
        return [*fold_text(self.data), f"{len(self.data.class_names):,} classes", *counts]

    @cached_property
    def splits(self) -> dict[str, Split]:
        return {role: getattr(self.data, role) for role in ROLES}

    @cached_property
    def counts(self) -> dict[str, np.ndarray]:
        """(C,) images of each class, by split."""
        classes = len(self.data.class_names)
        return {
            role: np.bincount(np.asarray(split.labels, dtype=np.int64), minlength=classes)
            for role, split in self.splits.items()
        }

    @property
    def most(self) -> int:
        """Images of the largest class in train."""
        return max(1, int(self.counts["train"].max()))

    @cached_property
    def sheets(self) -> list[Sheet]:
        """Some images of each class and split, drawn with the seed."""
        names = self.data.class_names[:MOST_CLASSES]
        each = max(1, min(MOST_OF_A_CLASS, MOST_THUMBNAILS // len(names)))
        drawn = {role: self._drawn(role, max(1, round(each * SHARES[role]))) for role in ROLES if each > 1}
        drawn = drawn or {"train": self._drawn("train", 1)}
        sheets = []
        for number, name in enumerate(with_bar(names, len(names), "drawing images", unit="classes")):
            pictures = {role: [self._picture(role, i) for i in chosen[number]] for role, chosen in drawn.items()}
            counts = {role: int(count[number]) for role, count in self.counts.items()}
            sheets.append(Sheet(name, self.readable_names.get(name), counts, pictures))
        return sheets

    def _drawn(self, role: str, each: int) -> list[list[int]]:
        """For each class the positions of up to `each` of its images, in the order of the split."""
        labels = np.asarray(self.splits[role].labels, dtype=np.int64)
        order = np.random.default_rng([self.seed, ROLES.index(role)]).permutation(len(labels))
        drawn: list[list[int]] = [[] for _ in self.data.class_names]
        for position in order.tolist():
            if len(drawn[labels[position]]) < each:
                drawn[labels[position]].append(position)
        return [sorted(positions) for positions in drawn]

    def _picture(self, role: str, position: int) -> Picture:
        split = self.splits[role]
        name = self.data.class_names[split.labels[position]]
        return Picture(thumbnail(split, position, EDGE), split[position].name, f"{role}, {name}")

    @cached_property
    def sizes(self) -> Sizes | None:
        """None if no size is known, because no image was decoded."""
        known = [
            (check.size, role, position)
            for role, split in self.splits.items()
            for position, check in enumerate(split.checks)
            if check and not check.fault
        ]
        if not known:
            return None
        edges = Counter(1 << (max(size) - 1).bit_length() for size, _, _ in known)
        smallest, largest = (end(known, key=lambda found: found[0][0] * found[0][1]) for end in (min, max))
        return Sizes(
            len(known),
            sorted(edges.items()),
            Counter(size for size, _, _ in known).most_common(MOST_SIZES),
            (self._picture(*smallest[1:]), smallest[0]),
            (self._picture(*largest[1:]), largest[0]),
        )

    @cached_property
    def copies(self) -> list[list[Picture]]:
        """Groups of equal images: first those in several splits or under several labels."""
        places: dict[str, list[tuple[str, int]]] = {}
        for role, split in self.splits.items():
            for position, key in enumerate(split.keys):
                if key is not None:
                    places.setdefault(key, []).append((role, position))
        groups = [group for group in places.values() if len(group) > 1]
        groups.sort(key=lambda group: -len({(role, self.splits[role].labels[i]) for role, i in group}))
        self.copied = len(groups)
        return [[self._picture(*place) for place in group[:2]] for group in groups[:MOST_COPIES]]

    @property
    def augmented(self) -> list[tuple[str, list[Thumbnail | None]]]:
        """The first image of some classes in all its views, itself first, with the name of the class."""
        if self.train_in is None or self.views == 1:
            return []
        first: dict[int, int] = {}
        for position, label in enumerate(self.data.train.labels):
            first.setdefault(label, position)
        places = [(self.data.class_names[label], first[label]) for label in sorted(first)[:MOST_AUGMENTED]]
        shown = []
        for name, position in places:
            # An epoch sees the view `epoch + position` of an image, counted in a circle.
            epochs = [(view - position) % self.views for view in range(min(self.views, MOST_VIEWS))]
            shown.append((name, [thumbnail(self.train_in(epoch), position, EDGE) for epoch in epochs]))
        return shown

    @property
    def is_clean(self) -> bool:
        """Whether all images were looked at, and nothing is wrong with them."""
        return self.data.checked and not (self.left_out or self.copies or self.data.near)

    @property
    def near(self) -> list[tuple[Place, Place]]:
        return near_pairs(self.data)

    @property
    def left_out(self) -> list[str]:
        """Unreadable images with their reasons."""
        return self.all_left_out[:MOST_LEFT_OUT]

    @cached_property
    def all_left_out(self) -> list[str]:
        """Those of a large dataset are still in their splits."""
        return [*self.data.skipped, *(fault for split in self.splits.values() for fault in split.faults.values())]


def write_data_page(path: Path, content: DataContent) -> None:
    """Write the page. Its size is bounded, whatever the number of images and classes.

    Raises:
        WriteError: it cannot be written.
    """
    write_page(path, render(TEMPLATE, page=content, mark=MARK))


def is_data_page(path: Path) -> bool:
    """Whether a file is a page that `write_data_page` has written."""
    with path.open("rb") as file:
        return MARK.encode() in file.read(1000)
