"""Images that the page shows one by one: which they are, and what is said of them. C = classes."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from vlm.data import Data, Split, UnreadableImage

if TYPE_CHECKING:  # --show-data needs no torch
    from vlm.evaluation import LabelIssue

MOST_IMAGES = 12  # mistakes, and as many uncertain images
MOST_SHOWN = 2 * MOST_IMAGES
MOST_ISSUES = 24  # labels that may be wrong
MOST_PAIRS = 12  # near-duplicates
MOST_PROBABLE = 3  # classes of an image
THUMBNAIL = 128  # pixels, the longer side
SMALL = 64  # pixels; an image that is no larger is kept as it is, without loss


@dataclass
class Prediction:
    """One test image as the page shows it.

    probabilities: (C,), sums to 1. text: what the model wrote, of the images that are shown one by one.
    """

    name: str
    label: int
    probabilities: np.ndarray
    text: str | None = None

    @property
    def predicted(self) -> int:
        return int(self.probabilities.argmax())

    @property
    def confidence(self) -> float:
        return float(self.probabilities.max())


@dataclass(frozen=True)
class Thumbnail:
    """A small copy of an image as a `data:` address. coarse: of an image so small that its pixels should be seen."""

    address: str
    coarse: bool


@dataclass(frozen=True)
class Card:
    """A test image with its prediction. probabilities: class, probability, and whether it is the true class."""

    image: Thumbnail | None
    name: str
    truth: str
    answer: str
    unsure: bool
    probabilities: list[tuple[str, float, bool]]
    text: str


@dataclass(frozen=True)
class Place:
    """An image of a split, next to one that it looks like."""

    image: Thumbnail | None
    name: str
    split: str
    truth: str


@dataclass(frozen=True)
class Doubt:
    """An image whose label may be wrong."""

    image: Thumbnail | None
    name: str
    split: str
    label: str
    suggested: str
    clear: bool


def doubt(issue: "LabelIssue", data: Data) -> Doubt:
    """What is said of a label that may be wrong."""
    split = getattr(data, issue.role)
    image, names = thumbnail(split, issue.position), data.class_names
    name = split.names[issue.position]
    return Doubt(image, name, issue.role, names[issue.label], names[issue.suggested], issue.clear)


def shown_images(predictions: Sequence[Prediction]) -> list[int]:
    """Positions of the images that the page shows one by one: those worth an explanation."""
    return confident_mistakes(predictions) + least_certain(predictions)


def confident_mistakes(predictions: Sequence[Prediction]) -> list[int]:
    """Positions of the wrong predictions with the highest confidence, highest first."""
    wrong = [i for i, p in enumerate(predictions) if p.predicted != p.label]
    return sorted(wrong, key=lambda i: -predictions[i].confidence)[:MOST_IMAGES]


def least_certain(predictions: Sequence[Prediction]) -> list[int]:
    """Positions of the predictions with the lowest confidence, lowest first, without the mistakes that are shown
    already."""
    left = set(range(len(predictions))) - set(confident_mistakes(predictions))
    return sorted(left, key=lambda i: (predictions[i].confidence, i))[:MOST_IMAGES]


def card(prediction: Prediction, class_names: list[str], image: Thumbnail | None, abstains_below: float) -> Card:
    """What is said of a test image: its most probable classes and the true one."""
    order = np.argsort(-prediction.probabilities, kind="stable").tolist()
    shown = order[:MOST_PROBABLE] + [i for i in order[MOST_PROBABLE:] if i == prediction.label]
    return Card(
        image=image,
        name=prediction.name,
        truth=class_names[prediction.label],
        answer=class_names[prediction.predicted],
        unsure=prediction.confidence < abstains_below,
        probabilities=[(class_names[i], float(prediction.probabilities[i]), i == prediction.label) for i in shown],
        text=(prediction.text or "").strip(),
    )


def near_pairs(data: Data) -> list[tuple[Place, Place]]:
    """The first near-duplicates, each with the image that it looks like."""

    def place(role: str, position: int) -> Place:
        split = getattr(data, role)
        image, label = thumbnail(split, position), split.labels[position]
        return Place(image, split.names[position], role, data.class_names[label])

    pairs = data.near[:MOST_PAIRS]
    return [(place(p.role, p.position), place(p.other, p.other_position)) for p in pairs]


def fold_text(data: Data) -> list[str]:
    """Which fold of a cross-validation a dataset is; nothing if it is none."""
    fold = data.source.get("fold")
    return [f"fold {fold['number']} of {fold['of']}"] if fold else []


def thumbnail(split: Split, position: int, edge: int = THUMBNAIL) -> Thumbnail | None:
    """A small copy of an image of a split, with a longest edge of `edge` pixels; None if it can no longer be read."""
    try:
        copy = split[position].image.copy()
    except UnreadableImage:  # it was there when the run began
        return None
    coarse = max(copy.size) <= SMALL
    copy.thumbnail((edge, edge))
    return Thumbnail(image_address(copy, "PNG") if coarse else image_address(copy, "JPEG", quality=80), coarse)


def image_address(image: Image.Image, kind: str, **options: Any) -> str:
    """An image as a `data:` address, so that it stands in a page itself. kind: PNG or JPEG; options: of Pillow."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
