"""Which score of a class is used (see `Calibration`): sum or prior, with the head or without, compared on validation.

N = images, C = classes.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlm.classifier import Calibration, VLMClassifier, batch_without_image, classify
from vlm.common import first_line
from vlm.config import AUTO, TEXT
from vlm.evaluation.fit_calibration import MIN_IMAGES, fit_calibration, fit_evidence

TOO_FEW = "so few validation images do not tell what the head is worth: it is left out."
LEAST_GAIN = 1e-6  # nats; smaller differences are rounding


class Choice(NamedTuple):
    """What was chosen, and from what.

    calibration: the chosen one. compared: temperature, nll (nats an image) and accuracy of each score on validation,
    each with a fit of its own; empty if there is nothing to fit. remarks: what people should know, one sentence each.
    candidates: the calibrations of text, head and both, if there is a head to choose.
    """

    calibration: Calibration
    compared: dict[str, dict[str, float]]
    remarks: list[str]
    candidates: dict[str, Calibration]


def choose_score(
    classifier: VLMClassifier,
    sums: Tensor,
    labels: Sequence[int],
    method: str,
    wanted: str,
    evidence: Tensor | None = None,
    counts: str = TEXT,
) -> "Choice":
    """The calibration of the score that is wanted or, with auto, of the one that `better_score` names.

    Args:
        sums: (N, C) of the validation images, exact. labels: (N,). method: see `fit_calibration`. wanted: sum, prior or
            auto.
        evidence: (N, C) logits of the head, if there is one. counts: text, head, both or, for what is better, auto.

    """
    whole = ~sums.isnan().any(1).numpy()
    comparable = bool(method != "none" and whole.sum() >= MIN_IMAGES)
    kinds, remarks = _kinds(classifier, comparable or wanted == "prior")
    if wanted == "prior" and "prior" not in kinds:
        remarks.append("--score prior cannot be had: the score is sum.")
    fits = {name: fit_calibration(kind.scores(sums), labels, method) for name, kind in kinds.items()}
    fitted = {
        name: replace(kind, temperature=fits[name][0].temperature, bias=fits[name][0].bias)
        for name, kind in kinds.items()
    }
    losses: dict[str, np.ndarray] = {}
    compared: dict[str, dict[str, float]] = {}
    if comparable:
        losses, compared = _compare(fitted, sums[whole], np.asarray(labels)[whole])
    chosen = better_score(losses) if wanted == AUTO else wanted if wanted in kinds else "sum"
    remarks += fits[chosen][1]
    if evidence is None or counts == TEXT:
        return Choice(fitted[chosen], compared, remarks, {})
    if not comparable:
        return Choice(fitted[chosen], compared, [*remarks, TOO_FEW], {})
    truth = np.asarray(labels)[whole]
    with_head = fit_evidence(fitted[chosen], sums[whole], evidence[whole], truth, method)
    for name, calibration in with_head.items():
        joined = calibration.with_evidence(sums[whole], evidence[whole])
        more_losses, more = _compare({name: calibration}, joined, truth)
        losses |= more_losses
        compared |= more
    best = better_score({"sum": losses[chosen]} | {name: losses[name] for name in with_head})
    kind = (TEXT if best == "sum" else best) if counts == AUTO else counts
    candidates = {TEXT: fitted[chosen], **with_head}
    return Choice(candidates[kind], compared, remarks, candidates)


def _compare(
    fitted: dict[str, Calibration], sums: Tensor, labels: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, float]]]:
    """For each score the (N,) NLL of the images, and its figures."""
    losses: dict[str, np.ndarray] = {}
    compared: dict[str, dict[str, float]] = {}
    for name, calibration in fitted.items():
        log_probabilities = calibration.log_probabilities(sums).numpy()
        losses[name] = -log_probabilities[np.arange(len(labels)), labels]
        compared[name] = {
            "temperature": calibration.temperature,
            "nll": float(losses[name].mean()),
            "accuracy": float((log_probabilities.argmax(1) == labels).mean()),
        }
    return losses, compared


def better_score(losses: dict[str, np.ndarray]) -> str:
    """The score with the smallest mean NLL, if it is below that of sum by more than one standard error of the paired
    difference; else sum.

    Args:
        losses: for each score (N,) the NLL of each image; empty: sum.
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


def _kinds(classifier: VLMClassifier, with_prior: bool) -> tuple[dict[str, Calibration], list[str]]:
    """The scores that the model has, nothing fitted yet, and why one is missing."""
    kinds, remarks = {"sum": Calibration()}, []
    if with_prior:
        prior, remark = measure_prior(classifier)
        if prior is not None:
            kinds["prior"] = Calibration(prior=prior)
        remarks += [remark] if remark else []
    return kinds, remarks


def measure_prior(classifier: VLMClassifier) -> tuple[tuple[float, ...] | None, str | None]:
    """The sums of the same conversation without an image, computed like those of any image.

    If a reasoning comes before the answer, it is the one that the model writes without an image.

    Returns:
        (C,) the sums, or None, and then why there are none.
    """
    batch = batch_without_image(classifier.rendered).to(classifier.device)
    try:
        sums = classify(classifier, batch, tolerance=0.0).scores[0].double()
        reason = None if torch.isfinite(sums).all() else "some log-probabilities are not finite"
    except Exception as error:  # models that need an image refuse each in their own way
        return None, _no_prior(f"{type(error).__name__}: {first_line(error)}")
    return (None, _no_prior(reason)) if reason else (tuple(sums.tolist()), None)


def _no_prior(reason: str) -> str:
    return f"the model cannot be read without an image ({reason}): its scores have no prior."
