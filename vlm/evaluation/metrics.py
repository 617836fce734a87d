"""Figures of merit from labels and class log-probabilities; NumPy and scikit-learn only.

N = samples, C = classes.
"""

import importlib.util
import math
import numbers
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from vlm.common import RunError, UsageError, first_line, note, shorten

# A probability of 0 counts as this in `nll`, so that one sample cannot make it infinite.
SMALLEST_LOG_PROBABILITY = -100.0

Metric = Callable[[np.ndarray, np.ndarray, np.ndarray, list[str]], Any]
Figures = float | dict[str, float | None] | None  # what is recorded of a metric


def classification_metrics(
    labels: Sequence[int], log_probabilities: np.ndarray, class_names: Sequence[str]
) -> dict[str, Any]:
    """The standard figures, as JSON values. The prediction is the most probable class.

    A class without samples has a support of 0 and counts with an F1 of 0 in `macro_f1`, as in scikit-learn.

    Args:
        labels: (N,) class indices.
        log_probabilities: (N, C) natural logarithms; each row sums to 1 after exp.
        class_names: C names.

    Returns:
        accuracy, macro_f1, weighted_f1, nll (mean negative log-likelihood of the true class, in nats), samples,
        macro_f1_of_present (the mean F1 of the classes that have samples, only if some have none),
        per_class {name: precision, recall, f1, support}, confusion_matrix (C lists of C counts: rows truth, columns
        prediction).

    Raises:
        RunError: a log-probability is NaN.
    """
    truth, scores = np.asarray(labels, dtype=np.int64), np.asarray(log_probabilities, dtype=np.float64)
    if scores.shape != (len(labels), len(class_names)) or len(labels) == 0:
        raise ValueError(
            f"{len(labels)} labels and {len(class_names)} classes do not fit log-probabilities of shape {scores.shape}"
        )
    broken = int(np.isnan(scores).any(axis=1).sum())
    if broken:
        raise RunError(
            f"{broken} of {len(labels)} images got NaN as a class probability: numbers overflowed in the model. "
            "Try a smaller --learning-rate, or --dtype float32."
        )
    predictions = scores.argmax(axis=1)
    classes = range(len(class_names))
    precision, recall, f1, support = precision_recall_fscore_support(
        truth, predictions, labels=classes, zero_division=0
    )
    present = support > 0
    partial = {} if present.all() else {"macro_f1_of_present": float(f1[present].mean())}
    true_scores = np.maximum(scores[np.arange(len(truth)), truth], SMALLEST_LOG_PROBABILITY)
    return {
        "accuracy": float((predictions == truth).mean()),
        "macro_f1": float(f1.mean()),
        **partial,
        "weighted_f1": float(np.average(f1, weights=support)),
        "nll": float(-true_scores.mean()),
        "samples": len(labels),
        "per_class": {
            name: {
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "f1": float(f1[i]),
                "support": int(support[i]),
            }
            for i, name in enumerate(class_names)
        },
        "confusion_matrix": confusion_matrix(truth, predictions, labels=classes).tolist(),
    }


def load_metric(specification: str) -> Metric:
    """The function that `file.py:function` names. The file is run.

    Raises:
        UsageError: no such file or function, or the file does not run.
    """
    path_text, colon, name = specification.rpartition(":")
    if not colon or not path_text or not name:
        raise UsageError(
            f"--metrics {specification}: expected FILE.py:FUNCTION, such as my_metrics.py:balanced_accuracy."
        )
    path = Path(path_text)
    if path.suffix != ".py" or not path.is_file():
        raise UsageError(f"--metrics {specification}: there is no Python file {path_text}; expected FILE.py:FUNCTION.")
    found = getattr(_import_file(path, specification), name, None)
    if not callable(found):
        raise UsageError(f"--metrics {specification}: {path_text} has no function {name}.")
    return found


def _import_file(path: Path, specification: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"vlm_user_metrics_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"--metrics {specification}: {path} is no Python file; expected FILE.py:FUNCTION.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look a module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UsageError(f"--metrics {specification}: {path} does not run: {_failure(error)}") from error
    return module


def user_metrics(
    metrics: Sequence[Metric],
    labels: np.ndarray,
    predictions: np.ndarray,
    probabilities: np.ndarray,
    class_names: Sequence[str],
) -> dict[str, Figures]:
    """What the user's own metrics give, by function name; a second function of the same name is called name_2.

    A metric that fails, or a figure that is not a finite number, is None, with a note that says why.

    Args:
        metrics: called with (labels, predictions, probabilities, class_names), each with copies of its own;
            each gives a number or a dict of numbers.
        labels: (N,) class indices.
        predictions: (N,) class indices.
        probabilities: (N, C), rows sum to 1.
        class_names: C names.
    """
    results: dict[str, Figures] = {}
    for metric in metrics:
        name = _free_name(str(getattr(metric, "__name__", type(metric).__name__)), results)
        try:
            value = metric(np.array(labels), np.array(predictions), np.array(probabilities), list(class_names))
            results[name] = _figures(value, name)
        except (Exception, SystemExit) as error:  # also of what the metric returns: it may be any object
            note(f"metric {name} failed and is recorded as null: {_failure(error)}")
            results[name] = None
    return results


def _failure(error: BaseException) -> str:
    """The kind of an error and the first line of what it says, which may go on for pages."""
    return f"{type(error).__name__}: {shorten(first_line(error), 300)}"


def _free_name(name: str, taken: dict[str, Any]) -> str:
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    return candidate


def _figures(value: Any, name: str) -> Figures:
    if isinstance(value, dict):
        return {str(key): _number(item, f"{name}[{key}]") for key, item in value.items()}
    return _number(value, name)


def _number(value: Any, name: str) -> float | None:
    number = value.tolist() if hasattr(value, "tolist") else value  # a scalar of NumPy or torch
    if isinstance(number, numbers.Real) and math.isfinite(number):
        return float(number)
    found = f"{str(value)[:60]} ({type(value).__name__})".replace("\n", " ")
    note(f"metric {name} is recorded as null: expected a finite number, or a dict of them, and got {found}.")
    return None
