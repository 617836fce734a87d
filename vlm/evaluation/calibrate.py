"""What results.json says about trust, beside the metrics: calibration, abstention, and the probe."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vlm.classifier.calibration import MIN_IMAGES, Calibration, Scores, coverage_and_accuracy, pick_threshold
from vlm.classifier.classifier import VLMClassifier
from vlm.common.progress import note
from vlm.config.settings import AUTO, Settings
from vlm.data.splits import Split
from vlm.evaluation.evaluate import score_split
from vlm.evaluation.probe import compare, probe
from vlm.evaluation.reliability import confidence_and_correctness, reliability_bins, reliability_figures
from vlm.evaluation.score_choice import choose_score
from vlm.families import load_family
from vlm.families.features import FeatureCache
from vlm.report.summary import is_calibrated, missed_target
from vlm.training.setup import Run


def calibrate(classifier: VLMClassifier, validation: Split, settings: Settings, workers: int = 0) -> dict[str, Any]:
    """Fit the classifier's calibration and its threshold to the validation split, and set them.

    Returns:
        method, score, scores (see `choose_score`), temperature, bias, remarks (list of sentences, also printed); and
        abstention, see `abstention`, where asked for.
    """
    threshold, target = settings.abstain_below, settings.target_precision
    calibration, compared, remarks, measured = Calibration(), {}, [], None
    if (
        settings.calibration != "none"
        or settings.score not in (AUTO, "sum")
        or threshold is not None
        or target is not None
    ):
        scores = score_split(
            classifier, validation, settings.eval_batch_size, workers=workers, description="calibrating", tolerance=0.0
        )
        calibration, compared, remarks = choose_score(
            classifier, scores, validation.labels, settings.calibration, settings.score
        )
        whole = ~scores.sums.isnan().any(1)
        truth = np.array(validation.labels)[whole.numpy()]
        measured = confidence_and_correctness(calibration.log_probabilities(*scores)[whole].numpy(), truth)
    if target is not None:
        threshold = pick_threshold(*measured, target)
        if threshold is None:
            remarks.append(f"{missed_target(target)}.")
        elif (kept := int((measured[0] >= threshold).sum())) < MIN_IMAGES:
            remarks.append(
                f"the threshold for --target-precision rests on {kept} validation images: on others it may be far off."
            )
    for remark in remarks:
        note(remark)
    classifier.calibration = replace(calibration, abstain_below=threshold)
    fitted = {
        "score": calibration.score,
        "scores": compared,
        "temperature": calibration.temperature,
        "bias": calibration.bias,
    }
    method = settings.calibration if is_calibrated(fitted) else "none"
    if method == "bias" and calibration.bias is None:
        method = "temperature"
    result = {"method": method, **fitted, "remarks": remarks}
    if threshold is not None or target is not None:
        known = None if threshold is None else coverage_and_accuracy(*measured, threshold)
        result["abstention"] = {"below": threshold, "target_precision": target, "validation": known}
    return result


def add_test_figures(
    fitted: dict[str, Any], calibration: Calibration, scores: Scores, labels: Sequence[int], seed: int
) -> dict[str, Any]:
    """What `calibrate` gave, with the test split: `calibration` and, where asked for, `abstention` of
    `results["test"]`."""
    after = calibration.log_probabilities(*scores).numpy()
    states = {"before": Calibration().log_probabilities(*scores).numpy(), "after": after}
    figures = {state: reliability_figures(values, labels, seed=seed) for state, values in states.items()}
    bins = {state: reliability_bins(*confidence_and_correctness(values, labels)) for state, values in states.items()}
    fitted = dict(fitted)
    abstention = fitted.pop("abstention", None)
    result = {"calibration": {**fitted, **figures, "reliability": bins}}
    if abstention:
        threshold = abstention["below"]
        on_test = (
            None if threshold is None else coverage_and_accuracy(*confidence_and_correctness(after, labels), threshold)
        )
        result["abstention"] = {**abstention, "test": on_test}
    return result


def probe_beside(
    run: Run, classifier: VLMClassifier, cache: FeatureCache | None, scores: Scores
) -> dict[str, Any] | None:
    """The probe on the vision encoder as the training found it, compared with the VLM's scores of test; None where it
    was not asked for."""
    if not run.settings.probe:
        return None
    family, encoder = classifier.family, "frozen"
    if run.settings.tune == "full":  # the trained encoder has seen the labels: what counts is the one before
        family = load_family(run.folder, run.dtype, run.accelerator.device, run.settings.image_options(run.data.edge))
        family.render(classifier.prompts)  # some processors encode images within the conversation
        encoder = "random weights" if run.settings.demo else "before the training"
    result = probe(family, run.data, cache)
    if result is None:
        return None
    found, theirs = result
    _, ours = confidence_and_correctness(
        classifier.calibration.log_probabilities(*scores).numpy(), run.data.test.labels
    )
    warning = compare(theirs, ours)
    if warning:
        note(warning)
    return {**found, "encoder": encoder, "warning": warning}
