"""What the page shows: results, data and predictions of a run, and what is chosen from them.

N = test images, C = classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from vlm.common import listed
from vlm.data import Data, Split
from vlm.evaluation import LabelIssue, is_calibrated, missed_target
from vlm.report.cards import (
    MOST_ISSUES,
    Card,
    Doubt,
    Place,
    Prediction,
    Thumbnail,
    card,
    confident_mistakes,
    doubt,
    fold_text,
    least_certain,
    near_pairs,
    thumbnail,
)
from vlm.report.summary import (
    MEANING,
    NEW,
    abstention_line,
    calibrated_validation_accuracy,
    ended_early,
    head_in_words,
    lacking_classes,
    lowest_first,
    probed_encoder,
    uncalibrated_accuracy,
    warnings_of,
)
from vlm.report.used_settings import used_settings

MOST_CONFUSIONS = 10
MOST_SAMPLES = 100  # classes with an image in the section on the data
MOST_ROWS = 100  # classes in the table of classes
WIDE = 0.1  # an interval of accuracy that is wider says little

Measured = tuple[float, float | None, float | None]  # value and its interval, if there is one


@dataclass(frozen=True)
class Sample:
    """A class with its first training image, or the first test image if nothing was trained. counts: images of each
    split."""

    name: str
    image: Thumbnail | None
    counts: list[tuple[str, int]]


@dataclass
class Content:
    """All that the page shows; see `write_report`."""

    results: dict[str, Any]
    data: Data
    predictions: Sequence[Prediction]
    issues: Sequence[LabelIssue] = ()

    @property
    def test(self) -> dict[str, Any]:
        return self.results["test"]

    @property
    def calibration(self) -> dict[str, Any]:
        return self.test["calibration"]

    @property
    def is_calibrated(self) -> bool:
        return is_calibrated(self.calibration)

    @property
    def names(self) -> list[str]:
        return self.data.class_names

    @property
    def readable_names(self) -> dict[str, str]:
        """Class name -> the other name that the model was shown (`--class-map`)."""
        return {code: name for code, name in self.results.get("readable_names", {}).items() if code != name}

    @property
    def title(self) -> str:
        task = self.results["settings"].get("task_description") or "Image classification"
        return task[:1].upper() + task[1:]

    @property
    def subtitle(self) -> list[str]:
        settings = self.results["settings"]
        model = settings.get("model") or ("the demo's model" if settings.get("demo") else None)
        counts = [f"{len(self.names):,} classes", f"{self.total:,} test images"]
        tested = self.results.get("timings", {}).get("tested_at")
        date = tested and f"tested at {tested}"
        facts = (*fold_text(self.data), model, self.data.source.get("dataset"), *counts, date)
        return [str(fact) for fact in facts if fact]

    @cached_property
    def counts(self) -> np.ndarray:
        """(C, C) the confusion matrix: rows truth, columns prediction."""
        return np.asarray(self.test["confusion_matrix"], dtype=np.int64)

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    @property
    def correct(self) -> int:
        return int(self.counts.trace())

    @property
    def accuracy(self) -> tuple[float, float, float]:
        """Accuracy on test and its 95% interval."""
        value, low, high = self.calibration["after"]["accuracy"]
        return value, low, high

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
            (self.names[row], self.names[column], int(wrong[row, column]), int(support[row]))
            for row, column in zip(rows[order], columns[order], strict=True)
        ]

    @property
    def concerns(self) -> list[str]:
        """Why the accuracy may mean less than it seems."""
        _, low, high = self.accuracy
        found = []
        if low <= self.majority[1]:
            where = "below" if high < self.majority[1] else "not clearly above"
            found.append(f"The accuracy is {where} that of always answering the most frequent class.")
        if high - low > WIDE:
            expected = f"on others like them, expect an accuracy of {low:.1%} to {high:.1%} (95% interval)"
            found.append(f"{self.total:,} test images are few: {expected}.")
        if "tested" in self.results and (unreadable := self.results["pictures"]["skipped"]):
            images = "1 image that" if unreadable == 1 else f"{unreadable:,} images that"
            found.append(f"No figure is about {images} could not be read.")
        abstention = self.test.get("abstention")
        if abstention and abstention["below"] is None:
            found.append(f"{missed_target(abstention['target_precision'])}.")
        found += warnings_of(self.results)
        return [text[0].upper() + text[1:] for text in found]

    @property
    def comparison(self) -> list[tuple[str, str | None, Measured]]:
        """(name, explanation, accuracy) of this model and of cheaper answers; only this model if there are none."""
        check, probe, zero_shot = self.results["picture_check"], self.results["probe"], self.results.get("zero_shot")
        images = f"on {check['pictures']:,} images, {check['accuracy']:.1%} with their own"
        rows: list[tuple[str, str | None, Any]] = [("This model", None, self.accuracy)]
        if unseen := self.test.get(NEW) or self.test.get("not_in_train"):
            splits = "neither in train nor in validation" if NEW in self.test else "not in train"
            rows.append(("This model, new images", f"{unseen['pictures']:,} that are {splits}", unseen["accuracy"]))
        if evidence := self.test.get("evidence"):
            shown = {
                "text": ("Text alone", "the score of its response"),
                "head": ("Head alone", head_in_words(evidence["head"])),
                "both": ("Text and head", "added up"),
            }
            others = (name for name in shown if name != evidence["counts"])
            rows += [(*shown[name], evidence["figures"][name]["accuracy"]) for name in others]
        if probe and not (evidence and probe["tower"] == "frozen"):  # then it is the head
            hint = f"logistic regression on {probed_encoder(probe['tower'])}"
            rows.append(("Linear probe", hint, probe["accuracy"]))
        if zero_shot:
            hint = f"the same model before training{uncalibrated_accuracy(self.results, '.1%')}"
            rows.append(("Zero-shot", hint, zero_shot["accuracy"]))
        rows.append(("Other image", f"exchanged with those of other classes, {images}", check["shuffled"]))
        rows.append(("No image", f"a gray one, {images}", check["gray"]))
        rows.append(("Most frequent class", "always the same answer", self.majority[1]))
        return [(name, hint, figure) for name, hint, value in rows if (figure := measured(value))]

    @property
    def label_issues(self) -> list[Doubt]:
        return [doubt(issue, self.data) for issue in self.issues[:MOST_ISSUES]]

    @property
    def lacking(self) -> list[tuple[str, int, str]]:
        """(class, images, what they are taken for) of the classes of the test images that the model lacks."""
        return lacking_classes(self.results)[:MOST_ROWS]

    @property
    def mistakes(self) -> list[Card]:
        return self._cards(confident_mistakes(self.predictions))

    @property
    def uncertain(self) -> list[Card]:
        return self._cards(least_certain(self.predictions))

    def _cards(self, positions: Sequence[int]) -> list[Card]:
        abstains_below = (self.test.get("abstention") or {}).get("below") or 0.0
        return [card(self.predictions[i], self.names, thumbnail(self.data.test, i), abstains_below) for i in positions]

    @property
    def classes(self) -> list[tuple[str, dict[str, Any]]]:
        """The measures of each class, the lowest F1 first; classes without a test image are last."""
        return lowest_first(self.test["per_class"])[:MOST_ROWS]

    @property
    def metrics(self) -> list[tuple[str, Measured, Measured | None]]:
        """(name, on test, on test before calibration) of what was measured and is finite."""
        test, before, after = self.test, self.calibration["before"], self.calibration["after"]
        rows: list[tuple[str, Any, Any]] = [
            ("Accuracy", after["accuracy"], before["accuracy"]),
            ("Macro F1", test["macro_f1"], None),
            ("Macro F1 of the classes with images", test.get("macro_f1_of_present"), None),
            ("Weighted F1", test["weighted_f1"], None),
            ("NLL, nats an image", after["nll"], before["nll"]),
            ("Brier score", after["brier"], before["brier"]),
            ("ECE", after["ece"], before["ece"]),
            ("Loss, nats a token", test.get("loss"), None),
        ]
        for name, value in test.get("own_metrics", {}).items():
            parts = value if isinstance(value, dict) else {"": value}
            rows += [(f"{name} {part}".strip(), number, None) for part, number in parts.items()]
        lacks = ", not calibrated" if uncalibrated_accuracy(self.results) else ""
        if "validation" in self.results:
            rows.append((f"Validation accuracy{lacks}", self.results["validation"]["accuracy"], None))
            rows.append(("Validation accuracy, calibrated", self.validation_calibrated, None))
        return [(name, figure, measured(earlier)) for name, now, earlier in rows if (figure := measured(now))]

    @property
    def before(self) -> str:
        """What the figures before calibration are called: they are always those of the sum."""
        return "before calibration" if self.calibration["score"] == "sum" else "by the sum, not calibrated"

    @property
    def meaning(self) -> dict[str, str]:
        return MEANING

    @property
    def abstaining(self) -> str | None:
        abstention = self.test.get("abstention")
        return abstention_line(abstention) if abstention else None

    @property
    def scores(self) -> list[tuple[str, float]]:
        """NLL on validation of each score that was compared."""
        compared = [(name, measured(figures["nll"])) for name, figures in self.calibration["scores"].items()]
        return [(name, nll[0]) for name, nll in compared if nll]

    @property
    def validation_calibrated(self) -> float | None:
        """The accuracy on validation by the score and with the biases of the test; None if it is that of the curve."""
        return calibrated_validation_accuracy(self.calibration)

    @property
    def best_step(self) -> int | None:
        """The step whose model was saved, if the history has its accuracy."""
        step = self.results["validation"]["step"]
        checked = {entry["step"] for entry in self.results["history"] if entry["kind"] == "validation"}
        return step if step in checked else None

    @property
    def ended_early(self) -> str | None:
        """Why and when the training ended before its last step, if it did."""
        ended = self.results.get("ended_early")
        return ended_early(ended) if ended else None

    @cached_property
    def split_counts(self) -> dict[str, np.ndarray]:
        """(C,) images of each class, by split; of a model that was only tested there is no other split."""
        splits = {"train": self.data.train, "validation": self.data.validation, "test": self.data.test}
        labels = {name: np.asarray(split.labels, dtype=np.int64) for name, split in splits.items() if len(split)}
        return {name: np.bincount(numbers, minlength=len(self.names)) for name, numbers in labels.items()}

    @property
    def was_trained(self) -> bool:
        """Whether the page is about a training, or only about a test of a saved model."""
        return len(self.data.train) > 0

    @property
    def training_images(self) -> tuple[int, int, int]:
        """Fewest, median and most training images of a class."""
        counts = self.split_counts["train"]
        return int(counts.min()), round(float(np.median(counts))), int(counts.max())

    @property
    def samples(self) -> list[Sample]:
        first, split = self.first_images, self._sampled
        samples = []
        for number in sorted(first)[:MOST_SAMPLES]:
            counts = [(role, int(counts[number])) for role, counts in self.split_counts.items()]
            samples.append(Sample(self.names[number], thumbnail(split, first[number]), counts))
        return samples

    @cached_property
    def first_images(self) -> dict[int, int]:
        """The position of the first image of each class that has some, in the split that `samples` shows."""
        first: dict[int, int] = {}
        for position, label in enumerate(self._sampled.labels):
            first.setdefault(label, position)
        return first

    @property
    def without_images(self) -> str:
        """The classes that have none there, in words."""
        return listed(name for number, name in enumerate(self.names) if number not in self.first_images)

    @property
    def _sampled(self) -> Split:
        return self.data.train if self.was_trained else self.data.test

    @property
    def near(self) -> list[tuple[Place, Place]]:
        return near_pairs(self.data)

    @property
    def facts(self) -> list[tuple[str | None, dict[str, Any]]]:
        """Settings, timings and versions with their headings."""
        measured_timings = {name: value for name, value in self.results["timings"].items() if value is not None}
        # The keys of results.json keep an old word.
        timings = {name.replace("pictures", "images"): value for name, value in measured_timings.items()}
        groups = [(None, used_settings(self.results)), ("Time", timings), ("Versions", self.results["versions"])]
        return [(heading, rows) for heading, rows in groups if rows]


def measured(value: Any) -> Measured | None:
    """A value with its interval, or a value without one; None for what is no finite number."""
    values = list(value) if isinstance(value, list | tuple) else [value, None, None]
    numbers = [v if isinstance(v, int | float) and math.isfinite(v) else None for v in values]
    return None if len(numbers) != 3 or numbers[0] is None else (numbers[0], numbers[1], numbers[2])
