"""After the last step: the best model is loaded from its folder, as a user would, and tested once; results and images
are written."""

import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm.classifier.classifier import VLMClassifier
from vlm.classifier.search import TOLERANCE
from vlm.common.progress import note
from vlm.data.splits import Split
from vlm.evaluation.calibrate import add_test_figures, calibrate, probe_beside
from vlm.evaluation.evaluate import check_texts, explanations, metrics_of_scores, score_split
from vlm.evaluation.image_check import check_images
from vlm.inference.model_folder import Progress, write_json
from vlm.inference.predictor import load_model_and_metadata
from vlm.report.figures import confusion_matrix, format_table, per_class_table, reliability_diagram, training_curves
from vlm.report.page import PAGE, Prediction, shown_images, write_page
from vlm.report.summary import summary_rows
from vlm.training.output import DEMO_IMAGES, METADATA, RESULTS, STATE
from vlm.training.setup import Run


def finish(run: Run, progress: Progress, metrics: Sequence[Callable[..., Any]]) -> dict[str, Any]:
    """Calibrate and test the best model, write `results.json`, the page and the images, and print the results to
    stdout.

    Returns:
        What stands in `results.json`.
    """
    settings, output, data = run.settings, run.output, run.data
    cache = run.classifier.feature_cache
    # Make room for the model that is loaded.
    run.model = run.optimizer = run.classifier = run.learned = run.fold_connectors = None
    run.accelerator.free_memory()
    classifier, _, metadata = load_model_and_metadata(
        output / "best_model", device=run.accelerator.device.type, dtype=_name(run)
    )
    if cache and cache.fits(classifier.family):  # unless the frozen weights are saved in another number format
        classifier.feature_cache = cache
    fitted = calibrate(classifier, data.validation, settings, run.workers)
    calibration = {"calibration": classifier.calibration.to_json(classifier.prompts)}
    write_json(output / "best_model" / METADATA, metadata | calibration)
    started = time.monotonic()
    tolerance = (
        TOLERANCE if classifier.calibration.is_temperature else 0.0
    )  # other searches say nothing of what was before calibration
    scores = score_split(
        classifier, data.test, settings.eval_batch_size, workers=run.workers, description="testing", tolerance=tolerance
    )
    test = metrics_of_scores(classifier, data.test.labels, scores, metrics)
    seconds = time.monotonic() - started
    test |= add_test_figures(fitted, classifier.calibration, scores, data.test.labels, settings.seed)
    results = {
        "test": test,
        **({"zero_shot": progress.zero_shot} if progress.zero_shot else {}),
        **({"alignment": progress.alignment} if progress.alignment else {}),
        "texts": check_texts(classifier, data.test, settings.eval_batch_size),
        "picture_check": check_images(classifier, data.test, scores, settings.eval_batch_size, settings.seed),
        "probe": probe_beside(run, classifier, cache, scores),
        **_of_the_run(run, progress, seconds),
    }
    if results["picture_check"]["warning"]:
        note(results["picture_check"]["warning"])
    _draw(run, progress, test)
    probabilities = classifier.calibration.log_probabilities(*scores).exp().numpy()
    write_page(
        output / PAGE,
        results,
        data,
        explained_predictions(classifier, data.test, probabilities, settings.eval_batch_size),
    )
    write_json(
        output / METADATA,
        run.metadata | calibration | {"test": {"accuracy": test["accuracy"], "macro_f1": test["macro_f1"]}},
    )
    if settings.demo:
        save_demo_images(data.test, output / DEMO_IMAGES)
    write_json(output / RESULTS, results)  # last: it says that the run is finished
    shutil.rmtree(output / STATE, ignore_errors=True)
    _print(run, results)
    return results


def explained_predictions(
    classifier: VLMClassifier, split: Split, probabilities: np.ndarray, batch_size: int
) -> list[Prediction]:
    """The predictions of a split from (N, C) probabilities, with a text for those that the page shows one by one."""
    predictions = [Prediction(*row) for row in zip(split.names, split.labels, probabilities, strict=True)]
    shown = shown_images(predictions)
    answers = [predictions[i].predicted for i in shown]
    for i, text in zip(shown, explanations(classifier, split, shown, answers, batch_size), strict=True):
        predictions[i].text = text
    return predictions


def _of_the_run(run: Run, progress: Progress, test_seconds: float) -> dict[str, Any]:
    """The figures that do not come from the test."""
    data, images = run.data, len(run.data.train) * run.settings.epochs
    return {
        "validation": {"accuracy": progress.best_accuracy, "loss": progress.best_loss, "step": progress.best_step},
        "pictures": {
            "train": len(data.train),
            "validation": len(data.validation),
            "test": len(data.test),
            "skipped": len(data.skipped),
        },
        "timings": {
            "train_seconds": round(progress.seconds, 2),
            "train_pictures_per_second": round(images / progress.seconds, 2) if progress.seconds else None,
            "test_seconds": round(test_seconds, 2),
            "test_pictures_per_second": round(len(data.test) / test_seconds, 2),
        },
        "device": {"type": run.accelerator.device.type, "dtype": _name(run)},
        "image_size": run.metadata["image_size"],
        "versions": run.metadata["versions"],
        "settings": run.settings.to_json(),
        "history": progress.history,
    }


def _draw(run: Run, progress: Progress, test: dict[str, Any]) -> None:
    training_curves(progress.history, run.output / "training_curves.png", progress.best_step)
    confusion_matrix(test["confusion_matrix"], run.data.class_names, run.output / "confusion_matrix.png")
    reliability_diagram(test["calibration"], run.output / "reliability.png")


def save_demo_images(split: Split, folder: Path) -> None:
    """Save the first test image of each class as a file, to have something to classify."""
    folder.mkdir(exist_ok=True)
    for label in sorted(set(split.labels)):
        image = split[split.labels.index(label)].image
        image.save(folder / f"digit_{label}.png")


def _name(run: Run) -> str:
    return str(run.dtype).removeprefix("torch.")


def _print(run: Run, results: dict[str, Any]) -> None:
    print(per_class_table(results["test"]))
    print("\n" + format_table(summary_rows(results)))
    images = str(run.output / DEMO_IMAGES) if run.settings.demo else "IMAGE_OR_FOLDER..."
    hint = f"{_command()} --model-dir {run.output / 'best_model'} {images}"
    note(f"\nThe results are in {run.output}. Classify images with:\n  {hint}")


def _command() -> str:
    """How to start the inference from here, with this Python: files of folders below by their relative paths, such as
    .venv/bin/python. If the training was started as `vlm-train`, it is `vlm-predict` next to it."""
    if Path(sys.argv[0]).name == "vlm-train":
        program = Path(sys.argv[0]).with_name("vlm-predict")
        return program.name if shutil.which(program.name) == str(program) else _from_here(program)
    python, script = (
        _from_here(Path(path)) for path in (sys.executable, Path(__file__).parents[2] / "inference_vlm.py")
    )
    return f"{'python' if shutil.which('python') == sys.executable else python} {script}"


def _from_here(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path.absolute()) if relative.startswith("..") else relative
