"""The probe: the head on the vision encoder as the training found it, which tells if the VLM is worth its cost.

N = images of a split, C = classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlm.common import note
from vlm.data import Data
from vlm.evaluation.head_fit import FittedHead, fit_head, vectors_of_split
from vlm.evaluation.reliability import accuracy_interval, may_be_chance
from vlm.families import Family, FeatureCache, NoVectors

WORSE = 0.02  # accuracy by which the VLM may be below without a warning


def probe(
    family: Family, data: Data, cache: FeatureCache | None = None, seed: int = 0
) -> tuple[dict[str, Any], np.ndarray] | None:
    """Fit a head to the training images, and test it on the same splits as the VLM.

    Args:
        family: the model whose vision encoder is probed. cache, seed: see `fit_head`.

    Returns:
        None, with a note, if the vision encoder has no features of its own; else what `probe_figures` returns.
    """
    try:
        fitted = fit_head(family, data.train, data.class_names, cache, seed)
    except NoVectors as error:
        note(f"no probe: {error}.")
        return None
    vectors, _ = vectors_of_split(family, data.test, range(len(data.test)), cache, fitted.head.layer)
    return probe_figures(fitted, data.test.labels, fitted.head.logits(torch.from_numpy(vectors)))


def probe_figures(fitted: FittedHead, labels: Sequence[int], logits: Tensor) -> tuple[dict[str, Any], np.ndarray]:
    """What the head reaches alone.

    Args:
        labels: (N,) of the test split. logits: (N, C).

    Returns:
        figures: accuracy on test, with its 95% interval; validation_accuracy, that of the cross-validation; and what
            `FittedHead.to_json` has.
        correct: (N,) bool, which test images are right.
    """
    correct = logits.argmax(1).numpy() == np.array(labels)
    figures = {"accuracy": accuracy_interval(correct), "validation_accuracy": fitted.accuracy}
    return figures | fitted.to_json() | {"seconds": round(fitted.seconds, 2)}, correct


def compare(theirs: np.ndarray, ours: np.ndarray) -> str | None:
    """A warning if the VLM is more than 2 points of test accuracy below the probe, and whether that may be chance.

    Args:
        theirs, ours: (N,) bool, which images are right by the probe and by the VLM.
    """
    ahead = theirs.mean() - ours.mean()
    if ahead <= WORSE + 1e-9:
        return None
    if may_be_chance(theirs, ours):
        return (
            f"the probe is {100 * ahead:.1f} points ahead, which may be chance: {len(ours)} test images are too few "
            "to tell."
        )
    return (
        f"the probe is {100 * ahead:.1f} points ahead: a linear classifier on only the vision features does better "
        "than the VLM. Train longer, try another --learning-rate or --tune, or use that classifier."
    )
