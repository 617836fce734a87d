"""Which score of a class is used: sum, mean or prior (see `Calibration`), compared on validation. N = images, C =
classes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device

from vlm.classifier.batching import batch_without_image
from vlm.classifier.calibration import MIN_IMAGES, Calibration, Scores, fit_calibration
from vlm.classifier.classifier import VLMClassifier
from vlm.classifier.reasoning import classify
from vlm.config.settings import AUTO

KINDS = ("sum", "mean", "prior")
LEAST_GAIN = 1e-6  # nats; where all lengths are equal, sum and mean differ by rounding alone


def choose_score(
    classifier: VLMClassifier, scores: Scores, labels: Sequence[int], method: str, wanted: str
) -> tuple[Calibration, dict[str, dict[str, float]], list[str]]:
    """The calibration of the score that is wanted or, with auto, of the one that `better_score` names.

    Args:
        scores: of N validation images, exact. labels: (N,). method: see `fit_calibration`. wanted: sum, mean, prior or
            auto.

    Returns:
        the calibration; temperature, nll (nats an image) and accuracy of each score on validation, each with a fit of
        its own, where there is anything to fit; and what people should know. Where no prior can be measured, sum stands
        for it.
    """
    whole = ~scores.sums.isnan().any(1).numpy()
    comparable = method != "none" and whole.sum() >= MIN_IMAGES
    names = KINDS if comparable else ("sum", wanted) if wanted != AUTO else ("sum",)
    kinds, remarks = _kinds(classifier, names)
    if wanted == "prior" and "prior" not in kinds:
        remarks.append("--score prior cannot be had: the score is sum.")
    fits = {name: fit_calibration(kind.scores(*scores), labels, method) for name, kind in kinds.items()}
    fitted = {
        name: replace(kind, temperature=fits[name][0].temperature, bias=fits[name][0].bias)
        for name, kind in kinds.items()
    }
    known, truth = Scores(*(values[whole] for values in scores)), np.asarray(labels)[whole]
    losses, compared = {}, {}
    for name, calibration in fitted.items() if comparable else ():
        log_probabilities = calibration.log_probabilities(*known).numpy()
        losses[name] = -log_probabilities[np.arange(len(truth)), truth]
        accuracy = float((log_probabilities.argmax(1) == truth).mean())
        compared[name] = {
            "temperature": calibration.temperature,
            "nll": float(losses[name].mean()),
            "accuracy": accuracy,
        }
    chosen = better_score(losses) if wanted == AUTO else wanted if wanted in kinds else "sum"
    return fitted[chosen], compared, [*remarks, *fits[chosen][1]]


def better_score(losses: dict[str, np.ndarray]) -> str:
    """The score with the smallest mean NLL of those that are below sum by more than one standard error of the paired
    difference; else sum.

    Args:
        losses: of each score (N,) the NLL of each image; none of any: sum.
    """
    best, smallest = "sum", np.inf
    for name, values in losses.items():
        gain = losses["sum"] - values
        if not np.isfinite(gain).all():
            continue
        least = max(LEAST_GAIN, gain.std(ddof=1) / np.sqrt(len(gain)))
        if gain.mean() > least and values.mean() < smallest:
            best, smallest = name, values.mean()
    return best


def _kinds(classifier: VLMClassifier, names: Sequence[str]) -> tuple[dict[str, Calibration], list[str]]:
    """The scores of these names that the model has, nothing fitted yet, and why one is missing."""
    kinds, remarks = {"sum": Calibration()}, []
    if "mean" in names:
        lengths = classifier.tree.lengths - len(classifier.rendered.opening_ids)
        kinds["mean"] = Calibration(lengths=tuple(lengths.tolist()))
    if "prior" in names:
        prior, remark = measure_prior(classifier)
        if prior is None:
            remarks.append(remark)
        else:
            kinds["prior"] = Calibration(prior=prior)
    return kinds, remarks


def measure_prior(classifier: VLMClassifier) -> tuple[tuple[float, ...] | None, str | None]:
    """(C,) the sums of the same conversation without an image, on the way of any other; or None, and why there are
    none.

    Where a reasoning comes before the answer, it is the one that the model writes without an image.
    """
    batch: dict[str, Any] = send_to_device(batch_without_image(classifier.rendered), classifier.device)
    try:
        sums = classify(classifier, batch, tolerance=0.0).scores[0].double()
        reason = None if torch.isfinite(sums).all() else "some log-probabilities are no finite numbers"
    except Exception as error:  # models that need an image refuse each in its own way
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if reason:
        return None, f"the model cannot be read without an image ({reason}): its scores have no prior."
    return tuple(sums.tolist()), None
