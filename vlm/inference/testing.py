"""A saved model on images with labels: the figures, as after a training, and the page.

N = images, C = classes.
"""

import platform
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vlm
from vlm.classifier import Calibration, VLMClassifier
from vlm.common import UsageError, dtype_name, format_table, note, write_json, writing
from vlm.config import RESULTS, ClassifySettings, flag_of
from vlm.data import Data, Split
from vlm.evaluation import accuracy_interval, add_test_figures, method_of, metrics_of_sums
from vlm.inference.arguments import OF_A_DATASET
from vlm.inference.classifying import Options, Outcome, settings_of
from vlm.inference.items import Item
from vlm.inference.job import Job, about_rows, run_job, show_table
from vlm.inference.labeled import KEPT, LABEL, DatasetItems
from vlm.inference.records import Tally
from vlm.inference.tested import Tested
from vlm.machine import Team
from vlm.report import NEW, per_class_table, summary_rows, warnings_of, write_report

BATCH_SIZE = 8  # of what follows the scores
NO_PREDICTION = "none"  # of an image for which the model abstains
PACKAGES = ("torch", "transformers", "pillow")


@dataclass
class SavedModelTest:
    """A test of a saved model while it runs: it takes the outcome of each image, and gives the results at the end.

    Attributes:
        model, metadata: what `load_model_and_metadata` returned. folder: of the model.
        items: what is classified.
        settings: how the dataset is read.
        options: how the images are classified. A calibration with biases or a prior needs exact scores: a search that
            stops early says nothing about the sums before it.
    """

    model: VLMClassifier
    metadata: dict[str, Any]
    folder: str
    items: DatasetItems
    settings: ClassifySettings
    options: Options
    unreadable: int = 0
    # of each image with a class of the model: (2, C) its scores, and its sums without evidence
    _scores: dict[int, Tensor] = field(default_factory=dict)
    _lacking: dict[str, Counter[str]] = field(default_factory=dict)  # class that the model lacks -> its predictions
    _next: int = 0
    _started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if self.items.has_labels and not self.model.calibration.is_temperature:
            self.options = replace(self.options, exhaustive=True)

    def run(
        self,
        team: Team,
        output: str | Path | None = None,
        resume: bool = False,
        shows: Callable[[Item], bool] = lambda item: False,
    ) -> Tally:
        """Classify all images.

        Args:
            team: the processes that do it.
            output: the file for a row of each image, with its label as a further column.
            resume: go on with this file.
            shows: without a file: whether the row of an image is printed.

        Raises:
            UsageError: a test of labeled images is to be shared or gone on with.
            The errors of `run_job`.
        """
        if self.items.has_labels and (resume or team.size > 1):
            what = "--resume" if resume else f"{team.size} processes"
            raise UsageError(
                f"{what}: a test needs the scores of all images at once. Leave this out, or classify without labels "
                "(--label-column none)."
            )
        given = self.model, self.metadata, self.items, self.options
        if output is None:
            return show_table(*given, self.take, shows)
        given_flags = {flag_of(name): str(value) for name, value in self._given.items()}
        about = about_rows(self.model, self.options) | given_flags
        readable = bool(self.model.prompts.readable_names)
        job = Job(Path(output), self.model.class_names, readable, team, about, resume, more=[LABEL])
        return run_job(*given, job, self.take)

    def take(self, outcome: Outcome) -> None:
        """Take the outcome of the next image."""
        position, self._next = self._next, self._next + 1
        label = self.items.images.labels[position]
        if outcome.scores is None or outcome.sums is None:
            self.unreadable += 1
        elif self.items.class_of(position) is not None:
            self._scores[position] = torch.stack([outcome.scores, outcome.sums.to(outcome.scores.dtype)])
        elif label is not None:
            predictions = self._lacking.setdefault(self.items.images.class_names[label], Counter())
            predictions[outcome.result["prediction"] or NO_PREDICTION] += 1

    def results(
        self, metrics: Sequence[Callable[..., Any]] = (), report_dir: str | Path | None = None
    ) -> dict[str, Any]:
        """What stands in `results.json`. `test` in it is None if no readable image has a class of the model as label.

        Args:
            metrics: own metrics; see `evaluate_vlm_model`.
            report_dir: write it there, with the page and the figures.

        Raises:
            WriteError: they cannot be written.
        """
        seconds = time.monotonic() - self._started
        tested = self._tested(metrics, seconds) if self._scores else None
        unlabeled = self.items.images.labels.count(None)
        results: dict[str, Any] = {
            "test": tested.metrics if tested else None,
            **({"unknown_classes": self._unknown(tested)} if self._lacking else {}),
            "pictures": {"test": len(self._scores), "unlabeled": unlabeled, "skipped": self.unreadable},
            "dataset": self.items.images.source,
            "tested": self._model_row(),
            "device": {"type": self.model.device.type, "dtype": dtype_name(self.model.model.dtype)},
            "image_size": self.metadata.get("image_size"),
            "versions": {"vlm": vlm.__version__, "python": platform.python_version()}
            | {name: version(name) for name in PACKAGES},
            "settings": self._shown_settings(),
        }
        if tested is None:
            return results
        prompts = self.model.prompts
        readable = dict(zip(prompts.class_names, prompts.readable_names, strict=False))
        results |= {
            **({"readable_names": readable} if readable else {}),
            "overlap": {f"test_in_{split}": len(seen & self._scores.keys()) for split, seen in self.items.seen.items()},
            "picture_check": tested.picture_check(self._seed),
            "probe": None,
            "timings": tested.timings(),
        }
        if report_dir is not None:
            results["texts"] = tested.texts()
            self._write(tested, results, Path(report_dir))
        return results

    @property
    def _seed(self) -> int:
        """Of resamples and of the image check: that of the training."""
        return settings_of(self.metadata).seed

    @property
    def _given(self) -> dict[str, Any]:
        """What was said about the dataset, by name."""
        given = {name: getattr(self.settings, name) for name in OF_A_DATASET}
        return {name: value for name, value in given.items() if value}

    def _shown_settings(self) -> dict[str, Any]:
        begin = {"task_description": self.metadata.get("task_description"), "model": self.folder}
        shown = {"abstain_below": self.model.calibration.abstain_below, "batch_size": self.options.batch_size}
        return begin | self._given | shown | {"exhaustive_scoring": self.options.exhaustive}

    def _tested(self, metrics: Sequence[Callable[..., Any]], seconds: float) -> Tested:
        positions = list(self._scores)
        sums, text_sums = torch.stack(list(self._scores.values()), dim=1)  # N times (2, C) -> (N, C) each
        labels = [self.items.class_of(i) or 0 for i in positions]
        split = Split(self.items.images.rows, positions, labels)
        calibration = self.model.calibration
        test = metrics_of_sums(self.model, labels, sums, metrics, text_sums)
        test |= add_test_figures(_as_fitted(calibration), calibration, sums, labels, self._seed, text_sums)
        tested = Tested(self.model, split, sums, test, seconds, self.options.batch_size or BATCH_SIZE)
        in_train, in_validation = (self.items.seen.get(split, set()) for split in KEPT)
        tested.count_unseen(np.array([i not in in_train for i in positions]))
        if in_validation & self._scores.keys():
            tested.count_unseen(np.array([i not in in_train | in_validation for i in positions]), NEW)
        return tested

    def _unknown(self, tested: Tested | None) -> dict[str, Any]:
        """The images of classes that the model lacks, and the accuracy if all of them count as wrong."""
        classes = {name: predictions.total() for name, predictions in self._lacking.items()}
        count = sum(classes.values())
        correct = np.concatenate([tested.correct if tested else np.zeros(0, bool), np.zeros(count, bool)])
        return {
            "pictures": count,
            "classes": classes,
            "predictions": {name: dict(found.most_common()) for name, found in self._lacking.items()},
            "accuracy_with_them": accuracy_interval(correct),
        }

    def _model_row(self) -> dict[str, Any]:
        """Which model was tested, and why its accuracy may mean less than it seems."""
        known = {name: self.metadata.get(name) for name in ("run_id", "model", "model_revision", "created")}
        counted = "train" in self.items.known
        warning = None if counted else seen_in_training(self.metadata, self.items.images.source)
        return {"folder": self.folder} | known | {"warning": warning}

    def _write(self, tested: Tested, results: dict[str, Any], folder: Path) -> None:
        images, names = self.items.images, list(self.model.class_names)
        none = tested.split.take([])
        data = Data(none, none, tested.split, names, 0, summary=self.items.summary, source=images.source)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RESULTS, results)  # the first one: a later test knows by it whose the other files are
        write_report(folder, results, data, tested.predictions())


def _as_fitted(calibration: Calibration) -> dict[str, Any]:
    """The calibration of a saved model as `calibrate` returns one that it has fitted. It is never fitted again."""
    biases = None if calibration.bias is None else list(calibration.bias)
    fitted: dict[str, Any] = {
        "method": method_of(calibration, "bias"),
        "score": calibration.score,
        "kind": calibration.kind,
        "evidence": calibration.evidence,
        "scores": {},
        "temperature": calibration.temperature,
        "bias": biases,
        "remarks": [],
    }
    if calibration.abstain_below:
        fitted["abstention"] = {"below": calibration.abstain_below, "target_precision": None, "validation": None}
    return fitted


def seen_in_training(metadata: dict[str, Any], source: dict[str, Any]) -> str | None:
    """A sentence if a model was trained on the split that it is tested on, as far as their names tell, else None.

    Args:
        metadata: of the model.
        source: `LabeledImages.source`.
    """
    trained = metadata.get("dataset") or {}
    same = all(trained.get(name) == source[name] for name in ("dataset", "config", "commit"))
    origin = str((trained.get("splits") or {}).get("train", {}).get("from", ""))
    split = source["split"].partition("[")[0]
    if not same or origin.partition(",")[0].partition("[")[0] != split:
        return None
    return (
        f"the model was trained on images of {split} of a dataset of this name, {source['dataset']}: on images that it "
        "has seen, the accuracy is too high"
    )


def print_results(results: dict[str, Any]) -> None:
    """Print the tables on stdout, and what makes the accuracy mean less than it seems on stderr."""
    if results["test"] is None:
        note("warning: no image with a label that is a class of the model could be read, so there is no test.")
        return
    unlabeled = results["pictures"]["unlabeled"]  # whose table stands above
    print(("\n" if unlabeled else "") + per_class_table(results["test"]))
    print("\n" + format_table(summary_rows(results)))
    for warning in warnings_of(results):
        note(f"warning: {warning}")
