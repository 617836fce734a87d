"""The table at the end of a run, in words for somebody who has not read the code. A function of what stands in
results.json alone."""

from typing import Any

from vlm.evaluation.calibrating import is_calibrated, missed_target
from vlm.report.figures import probed_encoder


def summary_rows(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value of each figure, the most important first; what was not measured is left out."""
    test, texts = results["test"], results["texts"]
    low, high = test["calibration"]["after"]["accuracy"][1:]
    validation = results["validation"]
    rows = [
        (
            "test accuracy",
            f"{test['accuracy']:.4f}  (95% interval {low:.4f} to {high:.4f}, {results['pictures']['test']} images)",
        )
    ]
    if "zero_shot" in results:
        rows.append(("test accuracy before training", f"{results['zero_shot']['accuracy']:.4f}"))
    rows += [
        *_probe_row(results["probe"]),
        ("macro F1, weighted F1", f"{test['macro_f1']:.4f}, {test['weighted_f1']:.4f}"),
        ("validation accuracy", f"{validation['accuracy']:.4f}  (step {validation['step']}, the best{_before_fit(test['calibration'])})"),
        *_calibration_rows(test["calibration"]),
        *([("abstaining", abstention_line(test["abstention"]))] if test.get("abstention") else []),
        _image_row(results["picture_check"]),
        ("texts written freely", f"{texts['agree_with_prediction']} of {texts['texts']} answer with the predicted class, "
                                 f"{texts['invalid']} with no class at all{_unread(texts)}"),
    ]  # fmt: skip
    if texts["reasoning_names_answer"] is not None:
        named = f"{texts['reasoning_names_answer']} of {texts['texts']}"
        rows.append(("reasonings", f"{named} texts written freely name the class in their reasoning, too"))
    own = [(name, _own(value)) for name, value in test.get("own_metrics", {}).items()]
    return [*rows, _training_row(results), *own]


def _probe_row(probe: dict[str, Any] | None) -> list[tuple[str, str]]:
    if probe is None:
        return []
    value, low, high = probe["accuracy"]
    return [
        (
            "accuracy of the probe",
            f"{value:.4f}  ({low:.4f} to {high:.4f}, logistic regression on {probed_encoder(probe['tower'])})",
        )
    ]


def _calibration_rows(calibration: dict[str, Any]) -> list[tuple[str, str]]:
    before, after = calibration["before"], calibration["after"]
    fitted = is_calibrated(calibration)
    values = []
    for name, key in (("ECE", "ece"), ("NLL", "nll")):
        value, low, high = after[key]
        earlier = f", {before[key][0]:.4f} before" if fitted else ""
        worse = ""
        if fitted and value > before[key][0]:
            worse = ": no clear change" if low <= before[key][0] <= high else ": worse on test than before"
        values.append((f"{name} on test", f"{value:.4f}  ({low:.4f} to {high:.4f}{earlier}{worse}; {MEANING[key]})"))
    how = f"temperature {calibration['temperature']:.3f}" + (
        " and a bias for each class" if calibration["bias"] else ""
    )
    rows = [("calibration", f"{how}, fitted on validation" if fitted else "none")]
    if calibration["score"] != "sum":
        compared = ", ".join(f"{name} {figures['nll']:.4f}" for name, figures in calibration["scores"].items())
        rows.append(
            ("score of a class", calibration["score"] + (f"  (NLL on validation: {compared})" if compared else ""))
        )
    return rows + values


MEANING = {
    "ece": "mean distance of confidence and accuracy, 0 at best",
    "nll": "-log of the probability of the true class, 0 at best",
    "brier": "squared distance of the probabilities from the truth, 0 at best, 2 at worst",
}


def _before_fit(calibration: dict[str, Any]) -> str:
    """What the validation accuracy of the training lacks: it is by the sum and without biases, which alone change what
    is predicted."""
    return "; before score and biases were fitted" if calibration["bias"] or calibration["score"] != "sum" else ""


def _unread(texts: dict[str, Any]) -> str:
    """What texts that disagree mean for the user, where most do: too short a training for texts, or one that does not
    teach them."""
    return (
        ""
        if 2 * texts["agree_with_prediction"] >= texts["texts"]
        else "; predictions and explanations do not depend on them"
    )


def abstention_line(abstention: dict[str, Any]) -> str:
    """What `abstention` in results.json says."""
    if abstention["below"] is None:
        return missed_target(abstention["target_precision"])
    shares = []
    for split in ("validation", "test"):
        coverage, accuracy = abstention[split]["coverage"], abstention[split]["accuracy"]
        right = "" if accuracy is None else f" ({accuracy:.1%} of them right)"
        shares.append(f"{coverage:.1%} of the {split} images{right}")
    return f"below a confidence of {abstention['below']:.4f}; answers {', '.join(shares)}"


def _image_row(check: dict[str, Any]) -> tuple[str, str]:
    known = [
        (name, check[key]) for name, key in (("exchanged", "shuffled"), ("gray", "gray")) if check[key] is not None
    ]
    others = ", ".join(f"{value:.3f} {name}" for name, value in known)
    counts = f"{check['pictures']} images, {check['accuracy']:.3f} with their own"
    return "accuracy with other images", f"{others}, chance {check['chance']:.3f}  ({counts})"


def _training_row(results: dict[str, Any]) -> tuple[str, str]:
    timings = results["timings"]
    if not results["settings"]["epochs"]:
        return "training", "none (--epochs 0)"
    return "training", f"{timings['train_seconds']:.1f} s, {timings['train_pictures_per_second']} images/s"


def _own(value: Any) -> str:
    """A number with four digits, or several of them with their names."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_own(number)}" for name, number in value.items())
    return f"{value:.4f}" if isinstance(value, float) else str(value)
