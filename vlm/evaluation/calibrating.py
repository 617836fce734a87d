"""What results.json says about trust, next to the metrics: calibration and abstention."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from vlm.classifier import Calibration, VLMClassifier
from vlm.common import note
from vlm.config import AUTO, Settings
from vlm.data import Split
from vlm.evaluation.evaluate import score_parts
from vlm.evaluation.fit_calibration import MIN_IMAGES, coverage_and_accuracy, pick_threshold
from vlm.evaluation.reliability import confidence_and_correctness, reliability_bins, reliability_figures
from vlm.evaluation.score_choice import choose_score
from vlm.families import FeatureCache


def calibrate(
    classifier: VLMClassifier,
    validation: Split,
    settings: Settings,
    workers: int = 0,
    cache: FeatureCache | None = None,
) -> dict[str, Any]:
    """Fit the classifier's calibration and its threshold to the validation split, and set them.

    Returns:
        method: temperature, bias or none. score: sum or prior. kind: text, head or both. scores: see `choose_score`.
        evidence: what the logits of the head are multiplied by, None if they do not count.
        temperature, bias: what was fitted.
        remarks: sentences, which are also printed. candidates: see `Choice`.
        validation_evidence: (N, C) logits of the head for the readable images; None without one.
        abstention: below, target_precision, validation (coverage and accuracy), if there is a threshold or one was
            asked for.
    """
    calibration, measured = Calibration(), None
    candidates: dict[str, Calibration] = {}
    evidence = None
    compared: dict[str, dict[str, float]] = {}
    remarks: list[str] = []
    if _is_needed(settings):
        sums, evidence = score_parts(
            classifier,
            validation,
            settings.eval_batch_size,
            workers=workers,
            description="calibrating",
            tolerance=0.0,
            cache=cache,
        )
        kept = validation.readable
        sums, labels = sums[kept], [validation.labels[i] for i in kept]
        evidence = None if evidence is None else evidence[kept]
        calibration, compared, remarks, candidates = choose_score(
            classifier, sums, labels, settings.calibration, settings.score, evidence, settings.evidence
        )
        whole = ~sums.isnan().any(1)
        log_probabilities = calibration.log_probabilities(calibration.with_evidence(sums, evidence))[whole].numpy()
        measured = confidence_and_correctness(log_probabilities, np.array(labels)[whole.numpy()])
    threshold = settings.abstain_below
    if settings.target_precision is not None and measured is not None:
        threshold, more = _threshold(*measured, settings.target_precision)
        remarks += more
    for remark in remarks:
        note(remark)
    classifier.calibration = replace(calibration, abstain_below=threshold)
    result: dict[str, Any] = {
        "method": method_of(calibration, settings.calibration),
        "score": calibration.score,
        "kind": calibration.kind,
        "evidence": calibration.evidence,
        "scores": compared,
        "temperature": calibration.temperature,
        "bias": calibration.bias,
        "remarks": remarks,
        "candidates": candidates,
        "validation_evidence": evidence,
    }
    if threshold is not None or settings.target_precision is not None:
        known = None if threshold is None or measured is None else coverage_and_accuracy(*measured, threshold)
        result["abstention"] = {
            "below": threshold,
            "target_precision": settings.target_precision,
            "validation": known,
        }
    return result


def _is_needed(settings: Settings) -> bool:
    """Whether anything has to be fitted to the validation split or measured on it."""
    return (
        settings.calibration != "none"
        or settings.score not in (AUTO, "sum")
        or settings.abstain_below is not None
        or settings.target_precision is not None
    )


def _threshold(confidence: np.ndarray, correct: np.ndarray, target: float) -> tuple[float | None, list[str]]:
    """The threshold for a precision on validation, and what people should know about it."""
    threshold = pick_threshold(confidence, correct, target)
    if threshold is None:
        return None, [f"{missed_target(target)}."]
    kept = int((confidence >= threshold).sum())
    if kept < MIN_IMAGES:
        return threshold, [
            f"the threshold for --target-precision rests on {kept} validation images: on others it may be far off."
        ]
    return threshold, []


def missed_target(target: float) -> str:
    """Why a model does not abstain though a precision was asked for; a sentence without its full stop."""
    right = f"{100 * target:g}% of the predictions on validation are right"
    return f"no confidence was found from which {right}: the model answers every image"


def is_calibrated(calibration: dict[str, Any]) -> bool:
    """Whether anything was fitted, by `calibration` as it stands in results.json."""
    return (
        calibration.get("temperature") != 1 or bool(calibration.get("bias")) or calibration.get("score", "sum") != "sum"
    )


def method_of(calibration: Calibration, asked: str) -> str:
    """What was fitted in the end: with few images nothing, and with a bounded temperature no biases."""
    if calibration.bias is not None:
        return asked
    return "none" if calibration.temperature == 1.0 and calibration.is_temperature or asked == "none" else "temperature"


def add_test_figures(
    fitted: dict[str, Any],
    calibration: Calibration,
    sums: Tensor,
    labels: Sequence[int],
    seed: int,
    text_sums: Tensor | None = None,
) -> dict[str, Any]:
    """What `calibrate` returned, with the figures of the test split.

    Args:
        sums: (N, C) of the test split. labels: (N,). text_sums: (N, C) without evidence, as before the calibration.

    Returns:
        `calibration` and, if there is one, `abstention`, for `results["test"]`.
    """
    after = calibration.log_probabilities(sums).numpy()
    before = Calibration().log_probabilities(sums if text_sums is None else text_sums).numpy()
    states = {"before": before, "after": after}
    figures = {state: reliability_figures(values, labels, seed=seed) for state, values in states.items()}
    bins = {state: reliability_bins(*confidence_and_correctness(values, labels)) for state, values in states.items()}
    fitted = {name: value for name, value in fitted.items() if name not in ("candidates", "validation_evidence")}
    abstention = fitted.pop("abstention", None)
    result = {"calibration": {**fitted, **figures, "reliability": bins}}
    if abstention:
        threshold, measured = abstention["below"], confidence_and_correctness(after, labels)
        on_test = None if threshold is None else coverage_and_accuracy(*measured, threshold)
        result["abstention"] = {**abstention, "test": on_test}
    return result
