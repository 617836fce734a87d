"""The tables at the end of a run, in words for somebody who has not read the code. They are functions of what stands
in `results.json` only, of a run or of a test of a saved model, which has no training and no validation."""

from typing import Any

from vlm.common import format_table, listed
from vlm.config import BOTH, LABEL_ISSUES, RESULTS
from vlm.evaluation import is_calibrated, missed_target

MEANING = {
    "ece": "mean distance of confidence and accuracy, 0 at best",
    "nll": "-log of the probability of the true class, 0 at best",
    "brier": "squared distance of the probabilities from the truth, 0 at best, 2 at worst",
}
ENCODERS = {
    "frozen": "the same vision encoder, which is frozen",
    "before the training": "the vision encoder as it was before the training",
    "random weights": "the vision encoder before the training (random weights)",
}

NEW = "not_in_train_or_validation"  # the key of the figures on images that a saved model was in no way fitted on

MOST_LINES = 100  # classes in the table at the end

Row = tuple[str, str]  # name and value


def summary_rows(results: dict[str, Any]) -> list[Row]:
    """Name and value of each measure, the most important first; what was not measured is left out."""
    test = results["test"]
    return [
        *_accuracy_rows(results),
        *_calibration_rows(test["calibration"]),
        *([("abstaining", abstention_line(test["abstention"]))] if test.get("abstention") else []),
        _image_row(results["picture_check"]),
        *(_text_rows(results["texts"]) if "texts" in results else []),
        _time_row(results),
        *((name, _own(value)) for name, value in test.get("own_metrics", {}).items()),
    ]


def fold_rows(results: dict[str, Any]) -> list[Row]:
    """Name and value of each measure of a cross-validation."""
    folds = len(results["folds"])
    rows = []
    for name, figures in results["over_folds"].items():
        low, high = figures["interval"]
        rows.append(
            (name.replace("_", " "), f"{figures['mean']:.4f}  (mean of {folds} folds, {low:.4f} to {high:.4f})")
        )
    return rows


def warnings_of(results: dict[str, Any]) -> list[str]:
    """Why the accuracy may mean less than it seems, one sentence each; the most important last."""
    lacks = [f"{_unknown_classes(results)}: the accuracy is that on the others."] if _unknown(results) else []
    tested = (results.get("tested") or {}).get("warning")
    seen = [f"{tested}."] if tested else []
    checks = [check["warning"] for name in ("probe", "picture_check") if (check := results[name]) and check["warning"]]
    return [*checks, *lacks, *seen, *_leaks(results)]


def _unknown(results: dict[str, Any]) -> dict[str, Any]:
    """What is known of the images of classes that the model lacks; nothing if there are none."""
    return results.get("unknown_classes", {})


def _unknown_classes(results: dict[str, Any]) -> str:
    unknown = _unknown(results)
    shown = listed(f"{name} ({count:,})" for name, count in unknown["classes"].items())
    images = "1 image has a class" if unknown["pictures"] == 1 else f"{unknown['pictures']:,} images have classes"
    return f"{images} that the model lacks, {shown}"


def lacking_classes(results: dict[str, Any]) -> list[tuple[str, int, str]]:
    """(class, images, what they are taken for) of the classes that the model lacks, the most images first."""
    unknown = _unknown(results)
    taken = {
        name: listed(f"{predicted} ({count:,})" for predicted, count in found.items())
        for name, found in unknown.get("predictions", {}).items()
    }
    counts = sorted(unknown.get("classes", {}).items(), key=lambda item: -item[1])
    return [(name, count, taken.get(name, "")) for name, count in counts]


def _leaks(results: dict[str, Any]) -> list[str]:
    """The test images that were trained on, if there are any."""
    overlap = results.get("overlap", {})  # results of earlier versions do not have it
    groups = overlap.get("test_groups_in_train", 0)
    found = (
        [f"{groups} groups of test are in train, too: the accuracy is that on groups the model has seen."]
        if groups
        else []
    )
    if not overlap.get("test_in_train", 0) and NEW not in results["test"]:
        return found
    others = results["test"].get(NEW) or results["test"]["not_in_train"]
    count = others["pictures"]
    which = "other one" if count == 1 else f"{count} others"
    rest = f"accuracy on the {which} {others['accuracy'][0]:.4f}" if count else "all"
    return [*found, f"{_used(results)}, too ({rest}): keep each in one split only."]


def _used(results: dict[str, Any]) -> str:
    """How many test images the training has used, and for what."""
    test, overlap, total = results["test"], results["overlap"], results["pictures"]["test"]
    uses = {"train": "in train", "validation": "in validation, by which the model was chosen and calibrated"}
    splits = ("train", "validation") if NEW in test else ("train",)
    counts = [(count, uses[split]) for split in splits if (count := overlap.get(f"test_in_{split}", 0))]
    are = "is" if counts[0][0] == 1 else "are"
    (count, use), *more = counts
    return f"{count} of {total} test images {are} {use}" + "".join(f", {count} {use}" for count, use in more)


def lowest_first(per_class: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """The measures of each class, the lowest F1 first; classes without a test image are last."""
    return sorted(per_class.items(), key=lambda item: (item[1]["support"] == 0, item[1]["f1"]))


def per_class_table(metrics: dict[str, Any]) -> str:
    """The table of what `classification_metrics` gives: one line a class, then the averages of F1 and the accuracy. Of
    more than `MOST_LINES` classes only those with the lowest F1."""
    per_class = metrics["per_class"]
    left = len(per_class) - MOST_LINES
    rows: list[tuple[Any, ...]] = [
        (name, measures["precision"], measures["recall"], measures["f1"], measures["support"])
        for name, measures in (lowest_first(per_class)[:MOST_LINES] if left > 0 else per_class.items())
    ]
    if left > 0:
        support = sum(measures["support"] for _, measures in lowest_first(per_class)[MOST_LINES:])
        rows.append((f"{left:,} more classes ({RESULTS})", None, None, None, support))
    rows.append(("macro average", None, None, metrics["macro_f1"], metrics["samples"]))
    rows.append(("weighted average", None, None, metrics["weighted_f1"], metrics["samples"]))
    rows.append(("accuracy", None, metrics["accuracy"], None, metrics["samples"]))
    return format_table(rows, ("class", "precision", "recall", "F1", "images"))


def abstention_line(abstention: dict[str, Any]) -> str:
    """What `abstention` in `results.json` says."""
    if abstention["below"] is None:
        return missed_target(abstention["target_precision"])
    shares = []
    for split in ("validation", "test"):
        if abstention[split] is None:  # a saved model does not keep what its threshold did on validation
            continue
        coverage, accuracy = abstention[split]["coverage"], abstention[split]["accuracy"]
        right = "" if accuracy is None else f" ({accuracy:.1%} of them right)"
        shares.append(f"{coverage:.1%} of the {split} images{right}")
    return f"below a confidence of {abstention['below']:.4f}; answers {', '.join(shares)}"


def evidence_line(evidence: dict[str, Any]) -> str:
    """What `evidence` in `results.json` says: which counts, and the test accuracy of each."""
    figures = ", ".join(f"{figures['accuracy'][0]:.4f}" for figures in evidence["figures"].values())
    value, low, high = evidence["differences"]["text"]
    counts = "both count" if evidence["counts"] == BOTH else f"the {evidence['counts']} counts"
    return f"{figures}  ({counts}; both to text {value:+.4f}, {low:+.4f} to {high:+.4f})"


def head_in_words(head: dict[str, Any]) -> str:
    """What the head reads, by `head` in `results.json`."""
    statistics = " and ".join(", ".join(head["statistics"]).rsplit(", ", 1))
    return f"logistic regression on block {head['layer']} of {head['layers']} of the vision encoder: {statistics}"


def probed_encoder(encoder: str | None) -> str:
    """In words, which vision encoder the probe was fitted on; `encoder` as `probe` in `results.json` has it."""
    return ENCODERS.get(encoder or "", "the vision encoder")


def _accuracy_rows(results: dict[str, Any]) -> list[Row]:
    test = results["test"]
    _, low, high = test["calibration"]["after"]["accuracy"]
    interval = f"95% interval {low:.4f} to {high:.4f}, {results['pictures']['test']} images"
    rows = [("test accuracy", f"{test['accuracy']:.4f}  ({interval})")]
    if unknown := _unknown(results):
        value, low, high = unknown["accuracy_with_them"]
        figure = f"{value:.4f}  ({low:.4f} to {high:.4f}; {_unknown_classes(results)})"
        rows.append(("accuracy, unknown classes as wrong", figure))
    if NEW in test:
        rows.append(("test accuracy, new images", _unseen(results, NEW)))
    elif "not_in_train" in test:
        rows.append(("test accuracy, images not in train", _unseen(results, "not_in_train")))
    if "zero_shot" in results:
        rows.append(
            ("test accuracy before training", f"{results['zero_shot']['accuracy']:.4f}{uncalibrated_accuracy(results)}")
        )
    if evidence := test.get("evidence"):
        rows.append(("text, head, both", evidence_line(evidence)))
    if issues := results.get("label_issues"):
        counts = f"{issues['listed']:,} of {issues['judged']:,}, {issues['clear']:,} of them clearly"
        rows.append(("labels that the head doubts", f"{counts}  ({LABEL_ISSUES})"))
    if results["probe"]:
        value, low, high = results["probe"]["accuracy"]
        how = f"logistic regression on {probed_encoder(results['probe']['tower'])}"
        rows.append(("accuracy of the probe", f"{value:.4f}  ({low:.4f} to {high:.4f}, {how})"))
    rows.append(("macro F1, weighted F1", f"{test['macro_f1']:.4f}, {test['weighted_f1']:.4f}{_of_present(test)}"))
    if "validation" not in results:
        return rows
    validation = results["validation"]
    step = f"step {validation['step']}, the best{_before_fit(test['calibration'])}"
    rows.append(("validation accuracy", f"{validation['accuracy']:.4f}  ({step})"))
    return rows


def _of_present(test: dict[str, Any]) -> str:
    """The macro F1 of the classes that have test images, if not all have some."""
    if "macro_f1_of_present" not in test:
        return ""
    count = sum(measures["support"] > 0 for measures in test["per_class"].values())
    classes = "the only class that has" if count == 1 else f"the {count:,} classes that have"
    return f"  (macro F1 of {classes} test images: {test['macro_f1_of_present']:.4f})"


def uncalibrated_accuracy(results: dict[str, Any], digits: str = ".4f") -> str:
    """What has to be said next to the accuracy of the untrained model, which has no calibration: the accuracy of the
    trained one without its own. Nothing if that predicts the same classes, as with only a temperature."""
    calibration = results["test"]["calibration"]
    if not calibration["bias"] and calibration["score"] == "sum":
        return ""
    return f" (not calibrated; the trained model without calibration: {calibration['before']['accuracy'][0]:{digits}})"


def _unseen(results: dict[str, Any], key: str) -> str:
    unseen, leak = results["test"][key], _used(results)
    if not unseen["pictures"]:
        return f"unknown: {leak}"
    value, low, high = unseen["accuracy"]
    images = "1 image" if unseen["pictures"] == 1 else f"{unseen['pictures']} images"
    return f"{value:.4f}  ({low:.4f} to {high:.4f}, {images}; {leak})"


def _before_fit(calibration: dict[str, Any]) -> str:
    """The validation accuracy with the calibration. During the training it is measured by the sum and without biases,
    and only these change what is predicted."""
    if not calibration["bias"] and calibration["score"] == "sum":
        return ""
    measured = calibrated_validation_accuracy(calibration)
    score = "" if calibration["score"] == "sum" else f"the score {calibration['score']}"
    changed = " and ".join(filter(None, (score, "the bias of each class" if calibration["bias"] else "")))
    return "; not calibrated" if measured is None else f"; {measured:.4f} with {changed}"


def calibrated_validation_accuracy(calibration: dict[str, Any]) -> float | None:
    """The accuracy on validation with the calibration, if that changes what is predicted and was measured."""
    if not calibration["bias"] and calibration["score"] == "sum":
        return None
    measured = calibration["scores"].get(calibration["score"])
    return measured.get("accuracy") if measured else None


def _calibration_rows(calibration: dict[str, Any]) -> list[Row]:
    biases = " and a bias for each class" if calibration["bias"] else ""
    fitted = f"temperature {calibration['temperature']:.3f}{biases}, fitted on validation"
    rows = [("calibration", fitted if is_calibrated(calibration) else "none")]
    if calibration["score"] != "sum":
        compared = ", ".join(f"{name} {measures['nll']:.4f}" for name, measures in calibration["scores"].items())
        hint = f"  (NLL on validation: {compared})" if compared else ""
        rows.append(("score of a class", f"{calibration['score']}{hint}"))
    for name, key in (("ECE", "ece"), ("NLL", "nll")):
        value, low, high = calibration["after"][key]
        change = _change(calibration, key)
        rows.append((f"{name} on test", f"{value:.4f}  ({low:.4f} to {high:.4f}; {MEANING[key]}){change}"))
    return rows


def _change(calibration: dict[str, Any], key: str) -> str:
    """The value before the calibration, and whether the calibration made it worse."""
    if not is_calibrated(calibration):
        return ""
    before, (value, low, high) = calibration["before"][key][0], calibration["after"][key]
    verdict = ", no clear change" if low <= before <= high else ", so it is worse on test"
    return f"; before the calibration {before:.4f}{verdict if value > before else ''}"


def _image_row(check: dict[str, Any]) -> Row:
    known = [
        (name, check[key]) for name, key in (("exchanged", "shuffled"), ("gray", "gray")) if check[key] is not None
    ]
    others = ", ".join(f"{value:.3f} {name}" for name, value in known)
    counts = f"{check['pictures']} images, {check['accuracy']:.3f} with their own"
    return "accuracy with other images", f"{others}, chance {check['chance']:.3f}  ({counts})"


def _text_rows(texts: dict[str, Any]) -> list[Row]:
    total, agree = texts["texts"], texts["agree_with_prediction"]
    invalid = f"{texts['invalid']} with no class at all"
    # Most texts disagree if the training is too short for texts, or does not teach them.
    remark = "; predictions and explanations do not depend on them" if 2 * agree < total else ""
    rows = [("texts written freely", f"{agree} of {total} answer with the predicted class, {invalid}{remark}")]
    if texts["reasoning_names_answer"] is not None:
        named = f"{texts['reasoning_names_answer']} of {total}"
        rows.append(("reasonings", f"{named} texts written freely name the class in their reasoning, too"))
    return rows


def _time_row(results: dict[str, Any]) -> Row:
    timings = results["timings"]
    if "train_seconds" not in timings:
        return "time", f"{timings['test_seconds']:.1f} s, {timings['test_pictures_per_second']} images/s"
    if not results["settings"]["epochs"]:
        return "training", "none (--epochs 0)"
    early = f"; {ended_early(results['ended_early'])}" if "ended_early" in results else ""
    return "training", f"{timings['train_seconds']:.1f} s, {timings['train_pictures_per_second']} images/s{early}"


def ended_early(ended: dict[str, Any]) -> str:
    """In words, why and when a training ended before its last step, as `ended_early` in `results.json` has it."""
    if ended["by"] == "patience":
        count = ended["given"]
        why = f"{count} evaluation{'s' * (count != 1)} without a better model (--patience)"
    else:
        why = f"--time-limit {ended['given']}"
    return f"ended after step {ended['step']:,} of {ended['steps']:,} because of {why}"


def _own(value: Any) -> str:
    """A number with four digits, or several of them with their names."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_own(number)}" for name, number in value.items())
    return f"{value:.4f}" if isinstance(value, float) else str(value)
