"""What the page shows: results, data and predictions, and what is chosen from them. N = test images, C = classes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from vlm.data import Data
from vlm.evaluation.reliability import wilson_interval

MOST_IMAGES = 12  # mistakes, and as many uncertain images
MOST_CONFUSIONS = 10
WIDE = 0.1  # an interval of accuracy that is wider says little


@dataclass
class Prediction:
    """One test image as the page shows it. probabilities: (C,), sums to 1; text: what the model wrote, of the shown
    images only."""

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


@dataclass
class Content:
    """All that the page shows; see `write_page`."""

    results: dict[str, Any]
    data: Data
    predictions: Sequence[Prediction]

    @property
    def test(self) -> dict[str, Any]:
        return self.results["test"]

    @property
    def names(self) -> list[str]:
        return self.data.class_names

    @cached_property
    def counts(self) -> np.ndarray:
        """(C, C) the confusion matrix: rows truth, columns prediction."""
        return np.asarray(self.test["confusion_matrix"], dtype=np.int64)

    @cached_property
    def accuracy(self) -> tuple[float, float, float]:
        """Share of correct predictions and its 95% interval: as measured with the calibration, else after Wilson."""
        for values in (self.calibration.get("after", {}), self.calibration.get("before", {})):
            if isinstance(values.get("accuracy"), list | tuple):
                return tuple(values["accuracy"])
        correct, total = int(self.counts.trace()), int(self.counts.sum())
        return self.test["accuracy"], *wilson_interval(correct, total)

    @property
    def calibration(self) -> dict[str, Any]:
        return self.test.get("calibration") or {}

    @property
    def abstains_below(self) -> float:
        """The confidence below which the model gives no answer; 0 where it always does."""
        return (self.test.get("abstention") or {}).get("below") or 0.0

    @cached_property
    def majority(self) -> tuple[str, float]:
        """The most frequent class of the test split, and its share: the accuracy of always answering it."""
        support = self.counts.sum(axis=1)
        return self.names[int(support.argmax())], float(support.max() / max(support.sum(), 1))

    @cached_property
    def favorite(self) -> tuple[str, int] | None:
        """The class that a collapsed model answers, and how often: at least a third of all answers and twice the
        class's images."""
        answers, support = self.counts.sum(axis=0), self.counts.sum(axis=1)
        most = int(answers.argmax())
        collapsed = 3 * answers[most] >= answers.sum() and answers[most] >= 2 * support[most]
        return (self.names[most], int(answers[most])) if collapsed else None

    @cached_property
    def confusions(self) -> list[tuple[str, str, int, int]]:
        """(truth, prediction, images, images of the true class) of the most frequent kinds of mistake."""
        wrong = self.counts - np.diag(np.diag(self.counts))
        rows, columns = np.nonzero(wrong)
        order = np.argsort(-wrong[rows, columns], kind="stable")[:MOST_CONFUSIONS]
        support = self.counts.sum(axis=1)
        return [
            (self.names[rows[i]], self.names[columns[i]], int(wrong[rows[i], columns[i]]), int(support[rows[i]]))
            for i in order
        ]

    @cached_property
    def mistakes(self) -> list[int]:
        return confident_mistakes(self.predictions)

    @cached_property
    def uncertain(self) -> list[int]:
        return least_certain(self.predictions)


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


def triple(value: Any) -> tuple[float, float | None, float | None] | None:
    """A figure with its interval, where there is one; None for what is no finite number."""
    values = list(value) if isinstance(value, list | tuple) else [value, None, None]
    numbers = [v if isinstance(v, int | float) and math.isfinite(v) else None for v in values]
    return None if len(numbers) != 3 or numbers[0] is None else tuple(numbers)
