"""The predictions of a cross-validation: each image is predicted by the one model that was not trained on it.

K = folds, N = images of all folds, C = classes.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t as student
from torch import Tensor

from vlm.classifier import TOLERANCE, VLMClassifier
from vlm.common import UsageError, reason, replacing
from vlm.config import FOLD_PREDICTIONS, RESULTS
from vlm.data import Split
from vlm.evaluation import LEVEL, classification_metrics, reliability_figures
from vlm.inference import PredictionFile, image_result
from vlm.report import Prediction

SHARES = ("accuracy", "macro_f1", "weighted_f1", "ece")  # figures between 0 and 1
MORE_COLUMNS = ("label", "fold")

Row = tuple[str, dict[str, Any]]  # an image's name, and its prediction with label and fold


class Fold(NamedTuple):
    """A fold that was trained and tested. results: the content of its `results.json`; rows: its predictions."""

    number: int
    results: dict[str, Any]
    rows: list[Row]


def write_fold_predictions(path: Path, classifier: VLMClassifier, split: Split, sums: Tensor) -> None:
    """Write the predictions of a fold as JSON lines.

    If the model writes a reasoning for each image, `full_response` is empty: to write them would take longer than the
    test.

    Args:
        sums: (N, C) scores of the test split.
    """
    prompts, calibration = classifier.prompts, classifier.calibration
    probabilities = calibration.log_probabilities(sums).exp()  # (N, C)
    bound = TOLERANCE if calibration.is_temperature else 0.0
    lines = []
    for name, label, row in zip(split.names, split.labels, probabilities, strict=True):
        best = int(row.argmax())
        text = "" if prompts.free else prompts.responses[best]
        result = image_result(prompts, row, best, bound, text, calibration.abstains(float(row[best])))
        line = {"path": name, "label": prompts.class_names[label], **result}
        lines.append(json.dumps(line, ensure_ascii=False))
    with replacing(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="backslashreplace")


def read_fold(folder: Path, number: int) -> Fold:
    """The results and predictions of a finished fold.

    Raises:
        UsageError: they cannot be read.
    """
    try:
        results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        rows = []
        for line in (folder / FOLD_PREDICTIONS).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows.append((row.pop("path"), row | {"fold": number}))
        if not rows or not all("label" in row and row["probabilities"] for _, row in rows):
            raise ValueError("it holds no predictions")
        results["test"]["calibration"]["after"]["ece"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"the results of {folder} cannot be read ({reason(error)}). Delete {folder}, then continue with --resume: "
            "this fold is trained again."
        ) from error
    return Fold(number, results, rows)


def write_predictions(path: Path, folds: Sequence[Fold]) -> None:
    """Write the predictions of all folds as a table: the columns of the inference, then label and fold."""
    rows = [row for fold in folds for row in fold.rows]
    names = list(rows[0][1]["probabilities"])
    readable = any("readable_name" in result for _, result in rows)
    with PredictionFile(path, names, readable, more=MORE_COLUMNS) as file:
        for name, result in rows:
            file.add(name, result)


def fold_figures(fold: Fold) -> dict[str, float]:
    """The figures of one fold by name; own metrics only if they are one number."""
    test = fold.results["test"]
    figures = {name: test[name] for name in ("accuracy", "macro_f1", "weighted_f1", "nll")}
    figures["ece"] = test["calibration"]["after"]["ece"][0]
    own = test.get("own_metrics", {})
    return figures | {name: value for name, value in own.items() if isinstance(value, (int, float))}


def mean_figures(figures: Sequence[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Mean, standard deviation and interval of the figures over K folds.

    The interval is that of Student's t with K - 1 degrees of freedom. It takes the folds as independent, which they are
    not, as they share training images: the variance over folds has no unbiased estimate (Bengio & Grandvalet 2004).

    Args:
        figures: of each fold, by name.

    Returns:
        By name: mean, standard_deviation (of the folds, with K - 1), interval (its two ends, at 95%).
    """
    found = {}
    for name in figures[0]:
        values = np.array([of_fold[name] for of_fold in figures if name in of_fold], dtype=float)
        mean, deviation = float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0
        half = float(student.ppf((1 + LEVEL) / 2, len(values) - 1)) * deviation / len(values) ** 0.5 if deviation else 0
        low, high = mean - half, mean + half
        if name in (*SHARES, "nll"):
            low = max(0.0, low)
        if name in SHARES:
            high = min(1.0, high)
        found[name] = {"mean": mean, "standard_deviation": deviation, "interval": [low, high]}
    return found


def pooled_figures(folds: Sequence[Fold], seed: int) -> dict[str, Any]:
    """The figures of the N out-of-fold predictions together.

    Returns:
        What `classification_metrics` returns, with accuracy, nll, brier and ece as `reliability_figures` has them: the
        value and both ends of its 95% interval.
    """
    names, labels, probabilities = _together(folds)
    with np.errstate(divide="ignore"):  # a probability of 0
        scores = np.log(probabilities)  # (N, C)
    return classification_metrics(labels, scores, names) | reliability_figures(scores, labels, seed=seed)


def predictions_of(folds: Sequence[Fold]) -> list[Prediction]:
    """The N out-of-fold predictions as the page shows them."""
    _, labels, probabilities = _together(folds)
    images = [(name, result["full_response"]) for fold in folds for name, result in fold.rows]
    return [
        Prediction(name, label, row, text)
        for (name, text), label, row in zip(images, labels, probabilities, strict=True)
    ]


def _together(folds: Sequence[Fold]) -> tuple[list[str], list[int], np.ndarray]:
    """The class names, the N labels and the (N, C) probabilities of all folds."""
    rows = [result for fold in folds for _, result in fold.rows]
    names = list(rows[0]["probabilities"])
    numbers = {name: number for number, name in enumerate(names)}
    probabilities = np.array([[result["probabilities"][name] for name in names] for result in rows])
    return names, [numbers[result["label"]] for result in rows], probabilities
