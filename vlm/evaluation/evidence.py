"""Text, head and both side by side, on the same images.

N = images, C = classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import norm

from vlm.classifier import Calibration
from vlm.evaluation.evaluate import Parts
from vlm.evaluation.reliability import LEVEL, accuracy_interval


def evidence_figures(candidates: Mapping[str, Calibration], parts: Parts, labels: Sequence[int]) -> dict[str, Any]:
    """What each way of counting reaches on a split, each with its own calibration from validation.

    Args:
        candidates: text, head and both. parts: of the split. labels: (N,).

    Returns:
        figures: for each of them accuracy (with its interval) and nll, in nats an image.
        differences: of both to text and to head: the difference in accuracy, with its paired interval.
    """
    truth, right, figures = np.asarray(labels), {}, {}
    for name, calibration in candidates.items():
        log_probabilities = calibration.log_probabilities(calibration.with_evidence(*parts)).numpy()
        right[name] = log_probabilities.argmax(1) == truth
        nll = float(-log_probabilities[np.arange(len(truth)), truth].mean())
        figures[name] = {"accuracy": accuracy_interval(right[name]), "nll": nll}
    others = [name for name in figures if name != "both"] if "both" in figures else []
    return {
        "figures": figures,
        "differences": {name: paired_difference(right["both"], right[name]) for name in others},
    }


def paired_difference(ours: np.ndarray, theirs: np.ndarray) -> list[float]:
    """Our accuracy minus theirs on the same images, and the 95% interval (Agresti and Min 2005, Statistics in Medicine
    24, 729: half an image is added to each of the four cells).

    Args:
        ours, theirs: (N,) bool, which images are right.
    """
    gained, lost = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    count = len(ours) + 2
    middle = (gained - lost) / count
    spread = np.sqrt((gained + lost + 1) / count - middle**2) / np.sqrt(count)
    reach = float(norm.ppf((1 + LEVEL) / 2) * spread)
    return [(gained - lost) / len(ours), max(-1.0, middle - reach), min(1.0, middle + reach)]
