"""What is measured of a tested model and shown on the page: the best model of a training, or a saved one.

N = images, C = classes.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from torch import Tensor

from vlm.classifier import VLMClassifier
from vlm.data import Split
from vlm.evaluation import accuracy_interval, check_images, check_texts, confidence_and_correctness, explanations
from vlm.families import FeatureCache
from vlm.report import Prediction, shown_images


@dataclass
class Tested:
    """A model and its scores of labeled images.

    Attributes:
        classifier: the model, calibrated. split: the images. sums: (N, C) log-probabilities of the scored texts,
        with the evidence that counts. evidence: (N, C) logits of the head, if there is one, whether it counts or not.
        metrics: what `results.json` calls test. seconds: they took. batch_size: images in one batch of what follows.
        cache: features that the model can be run from, if they are kept.
    """

    classifier: VLMClassifier
    split: Split
    sums: Tensor
    metrics: dict[str, Any]
    seconds: float
    batch_size: int
    cache: FeatureCache | None = None
    evidence: Tensor | None = None

    @property
    def correct(self) -> np.ndarray:
        """(N,) bool, whether each prediction is right."""
        log_probabilities = self.classifier.calibration.log_probabilities(self.sums)
        return confidence_and_correctness(log_probabilities.numpy(), self.split.labels)[1]

    def count_unseen(self, unseen: np.ndarray, name: str = "not_in_train") -> None:
        """Add the accuracy on the images that the training has not used, with its interval; nothing if that is all of
        them.

        Args:
            unseen: (N,) bool, whether train does not have an image.
            name: the key of the figures, which says what the training has not used them for.
        """
        if not unseen.all():
            accuracy = accuracy_interval(self.correct[unseen]) if unseen.any() else None
            self.metrics[name] = {"pictures": int(unseen.sum()), "accuracy": accuracy}

    def picture_check(self, seed: int) -> dict[str, Any]:
        """The accuracy with other images; see `check_images`."""
        return check_images(self.classifier, self.split, self.sums, self.batch_size, seed)

    def texts(self) -> dict[str, Any]:
        """What the model writes freely; see `check_texts`. If each class has one response, that names its class in any
        case, so nothing is said of reasonings."""
        found = check_texts(self.classifier, self.split, self.batch_size, cache=self.cache)
        return found if self.classifier.prompts.free else found | {"reasoning_names_answer": None}

    def timings(self) -> dict[str, Any]:
        """How long the test took, as in `results.json`."""
        speed = round(len(self.split) / self.seconds, 2)
        now = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
        return {"tested_at": now, "test_seconds": round(self.seconds, 2), "test_pictures_per_second": speed}

    def predictions(self) -> list[Prediction]:
        """The predictions of all images; if the model writes a reasoning for each image, with the text of those that
        the page shows one by one."""
        split, classifier = self.split, self.classifier
        probabilities = classifier.calibration.log_probabilities(self.sums).exp().numpy()
        predictions = [Prediction(*row) for row in zip(split.names, split.labels, probabilities, strict=True)]
        if not classifier.prompts.free:
            return predictions
        shown = shown_images(predictions)
        answers = [predictions[i].predicted for i in shown]
        texts = explanations(classifier, split, shown, answers, self.batch_size, self.cache)
        for i, text in zip(shown, texts, strict=True):
            predictions[i].text = text
        return predictions
