"""After the last step: the best model is loaded from its folder, as a user would, and tested once; results and pictures are written."""

import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlm.checkpoint import DEMO_PICTURES, METADATA, RESULTS, STATE, Progress, write_json
from vlm.data import Split
from vlm.evaluation import check_texts, evaluate_vlm_model
from vlm.predictor import load_model_and_metadata
from vlm.report import confusion_matrix, format_table, per_class_table, training_curves
from vlm.setup import Run
from vlm.tracking import note


def finish(run: Run, progress: Progress, metrics: Sequence[Callable[..., Any]]) -> dict[str, Any]:
    """Test the best model, write `results.json`, the curves and the confusion matrix, and print the results to stdout.

    Returns:
        What stands in `results.json`.
    """
    settings, output, data = run.settings, run.output, run.data
    run.model, run.optimizer, run.classifier = None, None, None  # make room for the model that is loaded
    run.accelerator.free_memory()
    classifier, _, _ = load_model_and_metadata(output / "best_model", device=run.accelerator.device.type, dtype=_name(run))
    started = time.monotonic()
    test = evaluate_vlm_model(classifier, data.test, settings.eval_batch_size, metrics, run.workers, "testing")
    seconds = time.monotonic() - started
    pictures = len(data.train) * settings.epochs
    results = {
        "test": test,
        **({"zero_shot": progress.zero_shot} if progress.zero_shot else {}),
        "texts": check_texts(classifier, data.test, settings.eval_batch_size),
        "validation": {"accuracy": progress.best_accuracy, "loss": progress.best_loss, "step": progress.best_step},
        "pictures": {"train": len(data.train), "validation": len(data.validation), "test": len(data.test), "skipped": len(data.skipped)},
        "timings": {
            "train_seconds": round(progress.seconds, 2),
            "train_pictures_per_second": round(pictures / progress.seconds, 2) if progress.seconds else None,
            "test_seconds": round(seconds, 2),
            "test_pictures_per_second": round(len(data.test) / seconds, 2),
        },
        "versions": run.metadata["versions"],
        "settings": settings.to_json(),
        "history": progress.history,
    }
    training_curves(progress.history, output / "training_curves.png", progress.best_step)
    confusion_matrix(test["confusion_matrix"], data.class_names, output / "confusion_matrix.png")
    write_json(output / METADATA, run.metadata | {"test": {"accuracy": test["accuracy"], "macro_f1": test["macro_f1"]}})
    if settings.demo:
        save_demo_pictures(data.test, output / DEMO_PICTURES)
    write_json(output / RESULTS, results)  # last: it says that the run is finished
    shutil.rmtree(output / STATE, ignore_errors=True)
    _print(run, results)
    return results


def save_demo_pictures(split: Split, folder: Path) -> None:
    """Save the first test picture of each class as a file, to have something to classify."""
    folder.mkdir(exist_ok=True)
    for label in sorted(set(split.labels)):
        picture = split[split.labels.index(label)].image
        picture.save(folder / f"digit_{label}.png")


def _name(run: Run) -> str:
    return str(run.dtype).removeprefix("torch.")


def _print(run: Run, results: dict[str, Any]) -> None:
    test, texts, timings = results["test"], results["texts"], results["timings"]
    print(per_class_table(test))
    rows = [
        ("test accuracy", f"{test['accuracy']:.4f}  ({results['pictures']['test']} pictures)"),
        ("macro F1, weighted F1", f"{test['macro_f1']:.4f}, {test['weighted_f1']:.4f}"),
        ("validation accuracy", f"{results['validation']['accuracy']:.4f}  (step {results['validation']['step']}, the best)"),
        ("free texts", f"{texts['agree_with_prediction']} of {texts['texts']} agree with the prediction, {texts['invalid']} invalid"),
        ("explanations", f"{texts['explanations_agree']} of {texts['texts']} agree with the prediction"),
        ("training", f"{timings['train_seconds']:.1f} s, {timings['train_pictures_per_second']} pictures/s"),
    ]
    if not run.settings.epochs:
        rows[-1] = ("training", "none (--epochs 0)")
    if "zero_shot" in results:
        rows.insert(1, ("test accuracy before training", f"{results['zero_shot']['accuracy']:.4f}"))
    if texts["reasoning_names_answer"] is not None:
        rows.insert(-1, ("reasonings", f"{texts['reasoning_names_answer']} of {texts['texts']} free texts name in it what they answer"))
    rows += [(name, str(value)) for name, value in test.get("own_metrics", {}).items()]
    print("\n" + format_table(rows))
    pictures = str(run.output / DEMO_PICTURES) if run.settings.demo else "IMAGE_OR_FOLDER..."
    hint = f"{_command()} --model-dir {run.output / 'best_model'} {pictures}"
    note(f"\nThe results are in {run.output}. Classify pictures with:\n  {hint}")


def _command() -> str:
    """How to start the inference from here: with this Python where it is that of a folder below, such as .venv."""
    python = os.path.relpath(sys.executable)
    script = os.path.relpath(Path(__file__).parent.parent / "inference_vlm.py")
    return f"{'python' if python.startswith('..') else python} {script}"
