"""After the last step: the best model is loaded from its folder, as a user would, and tested once."""

import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vlm.classifier import TOLERANCE, VLMClassifier
from vlm.common import RunError, command_of, dtype_name, format_table, note, replacing, write_json
from vlm.config import BEST_MODEL, DEMO_IMAGES, FOLD_PREDICTIONS, LABEL_ISSUES, METADATA, PAGE, RESULTS, TEXT
from vlm.data import Data, Split, leave_out_unreadable
from vlm.evaluation import (
    FittedHead,
    Parts,
    add_test_figures,
    calibrate,
    compare,
    evidence_figures,
    fit_head,
    metrics_of_sums,
    probe,
    probe_figures,
    score_parts,
)
from vlm.families import FeatureCache, NoVectors, load_family
from vlm.inference import Tested, load_model_and_metadata, read_metadata, update_metadata
from vlm.report import per_class_table, summary_rows, warnings_of, write_report
from vlm.training.ending import Ended
from vlm.training.label_issues import label_issues
from vlm.training.out_of_fold import write_fold_predictions
from vlm.training.output import can_go_on
from vlm.training.resume_state import Progress, delete_states
from vlm.training.run_files import claim_results
from vlm.training.run_log import RunLog
from vlm.training.setup import Run
from vlm.training.tracked_results import figures_of_test, results_of_test


def finish(
    run: Run, progress: Progress, metrics: Sequence[Callable[..., Any]], log: RunLog, ended: Ended | None = None
) -> dict[str, Any]:
    """Calibrate and test the best model, write `results.json`, the page and the figures, and print the results.

    Args:
        metrics: own metrics; see `evaluate_vlm_model`.
        log: is told the figures of the test.
        ended: why the training ended before its last step, if it did.

    Returns:
        The content of `results.json`.
    """
    output = run.output
    frozen = run.cache  # features of the vision encoder as the training found it
    leave_out_unreadable(run.data, "train")
    tested, calibration, fitted, on_validation = _test_best(run, metrics)
    leave_out_unreadable(run.data, "validation")
    issues = label_issues(run.data, fitted, on_validation, tested.evidence)
    results = {
        "test": tested.metrics,
        **({"zero_shot": progress.zero_shot} if progress.zero_shot else {}),
        **({"alignment": progress.alignment} if progress.alignment else {}),
        **({"ended_early": ended.to_json()} if ended else {}),
        **_checks(run, tested, fitted, frozen),
        **(issues.to_json() if issues else {}),
        **_of_the_run(run, progress, tested),
    }
    claim_results(output)
    predictions = tested.predictions()
    write_report(output, results, run.data, predictions, issues.found if issues else [])
    if issues:
        issues.write(output / LABEL_ISSUES, run.data)
    best = output / BEST_MODEL
    update_metadata(best, read_metadata(best), results, warnings_of(results))
    of_test = {name: tested.metrics[name] for name in ("accuracy", "macro_f1")}
    write_json(output / METADATA, run.metadata | calibration | {"test": of_test})
    if run.settings.demo:
        save_demo_images(run.data.test, output / DEMO_IMAGES)
    if run.settings.folds:
        write_fold_predictions(output / FOLD_PREDICTIONS, tested.classifier, run.data.test, tested.sums)
    write_json(output / RESULTS, results)  # last: it says that the run is finished
    if not can_go_on(results):
        delete_states(output)
    _track(log, progress.step, results)
    log.show(progress.step, lambda: results_of_test(output, tested.metrics, run.data, predictions))
    _print(run, results, log.places)
    return results


def _track(log: RunLog, step: int, results: dict[str, Any]) -> None:
    """Log the figures of the test, next to which trackers show those of the untrained model and of the probe."""
    log.log("test", step, **figures_of_test(results["test"]))
    if "zero_shot" in results:
        log.log("zero_shot", step, **results["zero_shot"])
    if results["probe"]:
        log.log("probe", step, accuracy=results["probe"]["accuracy"][0])


def _test_best(
    run: Run, metrics: Sequence[Callable[..., Any]]
) -> tuple[Tested, dict[str, Any], FittedHead | None, Tensor | None]:
    """Load the best model, fit its head, calibrate it on validation, and test it. Head and calibration are stored in
    its folder.

    Returns:
        The tested model; its calibration, for the metadata; its head and (N, C) what that says of the readable images
        of validation, None without one.
    """
    settings, data, folder = run.settings, run.data, run.output / BEST_MODEL
    cache = run.cache
    if not folder.is_dir():
        raise RunError(
            f"{folder} is gone, so it cannot be tested. Copy it there again, or start again with --overwrite."
        )
    del run.model, run.optimizer, run.classifier, run.learned  # make room for the model that is loaded
    run.accelerator.free_memory()
    classifier, _, metadata = load_model_and_metadata(
        folder, device=run.accelerator.device.type, dtype=dtype_name(run.dtype)
    )
    if metadata.get("run_id", run.metadata["run_id"]) != run.metadata["run_id"]:
        raise RunError(
            f"{folder} is the model of another run, so it is not tested as the best one of this run. Copy the "
            "folder of this run again, or start again with --overwrite."
        )
    if cache and not cache.fits(classifier.family):  # the frozen weights are saved in another number format
        cache = None
    head = _fit_head(run, classifier, cache)
    fitted = calibrate(classifier, data.validation, settings, run.workers, cache)
    calibration = {"calibration": classifier.calibration.to_json(classifier.prompts)}
    update_metadata(folder, metadata | calibration, head=classifier.counted_head)
    started = time.monotonic()
    sums, evidence = score_parts(
        classifier,
        data.test,
        settings.eval_batch_size,
        workers=run.workers,
        description="testing",
        # With biases, a prior or a head, a search that stops early says nothing about the sums before calibration.
        tolerance=TOLERANCE if classifier.calibration.is_temperature and head is None else 0.0,
        cache=cache,
    )
    kept = leave_out_unreadable(data, "test")
    parts = Parts(sums[kept], None if evidence is None else evidence[kept])
    joined = classifier.calibration.with_evidence(*parts)
    test = metrics_of_sums(classifier, data.test.labels, joined, metrics, parts.sums)
    seconds = time.monotonic() - started
    test |= add_test_figures(fitted, classifier.calibration, joined, data.test.labels, settings.seed, parts.sums)
    tested = Tested(classifier, data.test, joined, test, seconds, settings.eval_batch_size, cache, parts.evidence)
    tested.count_unseen(_unseen(data))
    if head and fitted["candidates"]:
        counts = {"counts": classifier.calibration.kind, "head": head.to_json()}
        test["evidence"] = counts | evidence_figures(fitted["candidates"], parts, data.test.labels)
    classifier.head = classifier.counted_head  # one that does not count is not run any more
    return tested, calibration, head, fitted["validation_evidence"]


def _fit_head(run: Run, classifier: VLMClassifier, cache: FeatureCache | None) -> FittedHead | None:
    """Give the classifier a head, unless it is not wanted or its vision encoder has no vectors (a note says so)."""
    settings = run.settings
    if settings.evidence == TEXT or settings.calibration == "none" or settings.streaming:
        return None
    try:
        found = fit_head(classifier.family, run.data.train, run.data.class_names, cache, settings.seed)
    except NoVectors as error:
        note(f"no head: {error}.")
        return None
    classifier.head = found.head
    return found


def _unseen(data: Data) -> np.ndarray:
    """(N,) bool, which of the test images train does not have."""
    known = set(data.train.keys) - {None}
    unseen = np.array([key not in known for key in data.test.keys])
    if not data.checked:  # else they were counted before the training
        data.overlap["test_in_train"] = int((~unseen).sum())
    return unseen


def _checks(run: Run, tested: Tested, fitted: FittedHead | None, frozen: FeatureCache | None) -> dict[str, Any]:
    """Free texts, the image check, and the probe if it was asked for.

    Args:
        fitted: the head of the tested model. frozen: features of the vision encoder as the training found it.
    """
    return {
        "texts": tested.texts(),
        "picture_check": tested.picture_check(run.settings.seed),
        "probe": _probe(run, tested, fitted, frozen) if run.settings.probe else None,
    }


def _probe(run: Run, tested: Tested, fitted: FittedHead | None, frozen: FeatureCache | None) -> dict[str, Any] | None:
    """The probe on the vision encoder as the training found it, compared with the VLM; None if it has no features. If
    the encoder was frozen, it is the head."""
    family, encoder, seed = tested.classifier.family, "frozen", run.settings.seed
    if run.settings.tune == "full":  # the trained encoder has seen the labels, so the one before is probed
        family = load_family(run.folder, run.dtype, run.accelerator.device, run.settings.image_options(run.data.edge))
        family.render(tested.classifier.prompts)  # some processors encode images within the conversation
        encoder = "random weights" if run.settings.demo else "before the training"
    elif fitted and tested.evidence is not None:
        found, correct = probe_figures(fitted, run.data.test.labels, tested.evidence)
        return {**found, "tower": encoder, "warning": compare(correct, tested.correct)}
    result = probe(family, run.data, frozen, seed)
    if result is None:
        return None
    found, correct_by_probe = result
    return {**found, "tower": encoder, "warning": compare(correct_by_probe, tested.correct)}


def _of_the_run(run: Run, progress: Progress, tested: Tested) -> dict[str, Any]:
    """The figures that do not come from the test."""
    data, images = run.data, run.images_until(progress)
    return {
        "validation": {"accuracy": progress.best_accuracy, "loss": progress.best_loss, "step": progress.best_step},
        "pictures": {
            "train": run.images_an_epoch,
            "validation": len(data.validation),
            "test": len(data.test),
            "skipped": len(data.skipped),
            **({"left_out": data.stream.left_out} if data.stream else {}),
        },
        "overlap": data.overlap,
        **({"readable_names": run.readable_names} if run.readable_names else {}),
        "timings": {
            "train_seconds": round(progress.seconds, 2),
            "train_pictures_per_second": round(images / progress.seconds, 2) if progress.seconds else None,
            **tested.timings(),
        },
        "device": {"type": run.accelerator.device.type, "dtype": dtype_name(run.dtype)},
        "image_size": run.metadata["image_size"],
        "versions": run.metadata["versions"],
        "settings": run.settings.to_json(),
        "history": progress.history,
    }


def save_demo_images(split: Split, folder: Path) -> None:
    """Save the first test image of each class as a file, to have something to classify."""
    folder.mkdir(exist_ok=True)
    for label in sorted(set(split.labels)):
        image = split[split.labels.index(label)].image
        with replacing(folder / f"digit_{label}.png") as temporary:
            image.save(temporary, format="PNG")


def _print(run: Run, results: dict[str, Any], tracked: Sequence[str]) -> None:
    print(per_class_table(results["test"]))
    print("\n" + format_table(summary_rows(results)))
    images = shlex.quote(str(run.output / DEMO_IMAGES)) if run.settings.demo else "IMAGE_OR_FOLDER..."
    model = shlex.quote(str(run.output / BEST_MODEL))
    hint = f"{command_of('inference_vlm.py', 'vlm-predict')} --model-dir {model} {images}"
    use = "" if run.settings.folds else f"Classify images with:\n  {hint}\n"
    recorded = "".join(f"Recorded for {place}\n" for place in tracked)
    where = f"The results are in {run.output} (docs/results.md explains them)"
    note(f"\n{use}{recorded}{where}; look at {run.output / PAGE} first.")
    for warning in warnings_of(results):  # last, where they are seen
        note(f"warning: {warning}")
