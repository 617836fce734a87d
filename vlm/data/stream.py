"""A training split that is read while it is trained on, because it is larger than the disk.

Its order is that of a shuffle buffer: a function of the seed and of how often the stream was read before. What a
process has read is a `Place`, from which a resumed run goes on.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vlm.common import UsageError, brief, note
from vlm.data.images import ImageSource, UnreadableImage, open_image
from vlm.data.sample import Sample

MOST_SHOWN = 3


class Place(NamedTuple):
    """How far one process has read: how often the whole stream, and how many rows since."""

    epoch: int = 0
    row: int = 0


class Row(NamedTuple):
    """A row as a source gives it: what `open_image` takes, the label as it is there, a text or None, and a name."""

    image: ImageSource | None
    label: object
    reasoning: str | None
    name: str


@dataclass
class Stream:
    """Rows of a training split, one after the other.

    Attributes:
        rows: the rows that a process reads in an epoch, after the first `start`: (epoch, start, process, processes).
        numbers: the class number of each label, as `label_key` has it.
        held_out: digests of images that another split has, and training therefore leaves out.
        left_out: counts what was not trained on, by reason.
    """

    rows: Callable[[int, int, int, int], Iterator[Row]]
    numbers: Mapping[object, int]
    held_out: frozenset[str] = frozenset()
    left_out: dict[str, int] = field(default_factory=dict)

    def read(self, place: Place, process: int = 0, processes: int = 1) -> Iterator[tuple[Row, Place]]:
        """Rows without an end, each with the place after it: what comes after `place`, for one of several processes.

        Raises:
            UsageError: the stream has no rows for this process.
        """
        epoch, row = place
        while True:
            before = row
            for found in self.rows(epoch, row, process, processes):
                row += 1
                yield found, Place(epoch, row)
            if row == before == 0:
                raise UsageError("--streaming: the train split has no rows for this process. Use fewer processes.")
            epoch, row = epoch + 1, 0

    def sample(self, row: Row) -> Sample | None:
        """The decoded image of a row; None if it is not trained on, which is counted and, at first, noted."""
        number = self.numbers.get(label_key(row.label))
        if number is None:
            is_none = row.label is None or row.label == -1 or not str(row.label).strip()
            reason = "without a label" if is_none else "with a label that is none of the classes"
            self._leave_out(reason, row.name if is_none else f"{row.name}: {brief(row.label)}")
            return None
        if self.held_out and digest(row.image) in self.held_out:
            self._leave_out("in validation or test, too", None)
            return None
        try:
            return Sample(open_image(row.image, row.name), number, row.name, row.reasoning)
        except UnreadableImage as error:
            self._leave_out("unreadable", str(error))
            return None

    def _leave_out(self, reason: str, shown: str | None) -> None:
        count = self.left_out[reason] = self.left_out.get(reason, 0) + 1
        if shown and count <= MOST_SHOWN:
            note(f"left out of the training, {reason}: {shown}")


def label_key(label: object) -> object:
    """A label as the keys of `Stream.numbers` have it: texts without white space around them."""
    return label.strip() if isinstance(label, str) else label


def digest(image: Any) -> str:
    """A name for the bytes of an image, before it is decoded; empty if they are not at hand."""
    return hashlib.sha256(image).hexdigest() if isinstance(image, bytes) else str(image or "")
