"""Before the first step: a connector that was never trained learns the names of the classes
(vlm/training/alignment.py), and so do those of the folds (vlm/training/cross_fit.py). In all processes alike.
"""

import shutil
import time
from typing import Any

import torch
from accelerate.utils import broadcast

from vlm.common.errors import RunError
from vlm.common.progress import note
from vlm.families.features import FeatureCache
from vlm.inference.model_folder import Progress
from vlm.training.alignment import align, nearest_name_accuracy
from vlm.training.cross_fit import align_folds, out_of_fold_cache
from vlm.training.output import FOLD_FEATURES
from vlm.training.setup import Run, least


def first_stage(run: Run, progress: Progress) -> FeatureCache | None:
    """Align what is to be aligned, unless the run goes on from a state, which holds what was learned.

    Returns:
        What the training reads in the place of the classifier's cache: the features behind the connectors of folds,
        where there are any.

    Raises:
        RunError: these cannot be kept. Without them the training would be another one.
    """
    if not run.aligns or progress.epoch >= run.settings.epochs:
        return None
    if not progress.step:
        progress.alignment = _align(run)
    if not run.fold_connectors:
        return None
    classifier, how = run.classifier, (run.settings.seed, run.accelerator.autocast)
    with run.accelerator.local_main_process_first():
        kept = out_of_fold_cache(
            classifier.family,
            run.data.train,
            classifier.feature_cache,
            run.fold_connectors,
            run.output / FOLD_FEATURES,
            *how,
        )
    if not least(run.accelerator, int(kept is not None)):
        raise RunError(
            f"{run.output / FOLD_FEATURES} cannot keep the images behind the connectors of the folds, on which --freeze-connector "
            "trains: make room, give a larger --cache-size, or train the connector too (no --freeze-connector)."
        )
    return kept


def forget_features(run: Run) -> None:
    """Delete, on each machine, what `first_stage` has kept: no other run has these connectors."""
    run.accelerator.wait_for_everyone()
    if run.fold_connectors and run.accelerator.is_local_main_process:
        shutil.rmtree(run.output / FOLD_FEATURES, ignore_errors=True)


def _align(run: Run) -> dict[str, Any]:
    """Align the connector and those of the folds.

    Returns:
        seconds; folds; validation_accuracy: the share of validation images (of up to 512) that are nearest to the
        name of their class.
    """
    started = time.monotonic()
    family, names, cache = run.classifier.family, run.classifier.class_names, run.classifier.feature_cache
    how = run.settings.seed, run.accelerator.autocast
    note(
        "the connector was never trained: it learns the names of the classes first (--no-alignment leaves it as it is)."
    )
    align_folds(family, names, run.data.train, cache, run.fold_connectors, *how)
    align(family, names, run.data.train, cache, *how)
    with torch.no_grad():
        for weights in (family.connector.state_dict(), *run.fold_connectors):
            for weight in weights.values():
                weight.copy_(broadcast(weight))  # several processes go on from the same numbers
    with run.accelerator.autocast():
        accuracy = nearest_name_accuracy(family, names, run.data.validation, cache)
    note(f"{accuracy:.1%} of the validation images are nearest to the name of their class.")
    return {
        "seconds": round(time.monotonic() - started, 2),
        "folds": len(run.fold_connectors),
        "validation_accuracy": accuracy,
    }
