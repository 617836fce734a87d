"""--folds: cross-validation. Each fold is an ordinary run in a folder of its own, with one fold of the images as test.

A fold that is finished is kept when the cross-validation is resumed; one that was interrupted is resumed.
"""

import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import vlm
from vlm.classifier import key_of
from vlm.common import Stopped, UsageError, command_of, format_table, note, process_count, write_json
from vlm.config import (
    METADATA,
    PAGE,
    PREDICTIONS,
    RESULTS,
    RunSettings,
    Settings,
    flags_to_train_once,
    fold_folder,
    how_to_resume,
    read_run,
    written_by,
)
from vlm.data import Data
from vlm.report import COLUMNS, fold_rows, write_folds_report
from vlm.training.deadline import Deadline
from vlm.training.out_of_fold import (
    Fold,
    fold_figures,
    mean_figures,
    pooled_figures,
    predictions_of,
    read_fold,
    write_predictions,
)
from vlm.training.output import output_folder
from vlm.training.resume_state import delete_states
from vlm.training.run_files import begin, claim_results, drop_previous
from vlm.training.running import fit
from vlm.training.setup import Run
from vlm.training.stopping import TRAINING

# What has to be the same for all folds, by the name of its digest.
SAME = {"digest": "the images, labels or groups", "texts": "the class names or the texts of the conversation"}
DECIDED = ("batch_size", "gradient_accumulation_steps", "objective")  # by the first fold, for all


class CrossValidation:
    """A cross-validation while it runs.

    Args:
        settings: of the whole; those that the first fold decides are filled in.
        should_stop, enter, dataset: see `fit`. deadline: of all folds; what is left is divided evenly among them.
    """

    def __init__(
        self,
        settings: Settings,
        should_stop: Callable[[], bool],
        enter: Callable[[str], None],
        dataset: object,
        deadline: Deadline | None,
    ) -> None:
        self.settings, self.output = settings, Path(settings.output_dir)
        self.should_stop, self.enter, self.dataset = should_stop, enter, dataset
        self.count = settings.folds or 0
        self.deadline = deadline or Deadline.of(settings)
        self.of_fold = self.deadline
        self.digests = _saved_digests(self.output) if settings.resume else {}
        self.metadata: dict[str, Any] = {}
        self.data: Data | None = None  # of the fold that was trained last

    def train(self, number: int) -> Fold:
        """Train and test a fold, unless that is done already."""
        folder = self.output / fold_folder(number)
        if (folder / RESULTS).is_file():
            note(f"fold {number} of {self.count}: finished before, and kept.")
            return read_fold(folder, number)
        resume = (folder / METADATA).is_file()
        settings = replace(self.settings, fold=number, output_dir=str(folder), resume=resume, overwrite=False)
        self.of_fold = replace(self.deadline)
        self.enter("")  # nothing is trained until the fold is set up
        try:
            with redirect_stdout(sys.stderr):  # stdout is for the table of all folds
                brief = self.data is not None  # another fold has printed settings and a sample
                fit(settings, self.should_stop, self._entered, self.dataset, self._set_up, self.of_fold, brief)
        except Stopped as stopped:
            raise self._stopped(number, stopped) from None
        except Exception:
            if (self.output / METADATA).is_file():
                note(f"fold {number} of {self.count} did not end. {self._resumable()}")
            raise
        drop_previous(self.output)
        return read_fold(folder, number)

    def _set_up(self, run: Run) -> None:
        """A fold can start: what it has decided holds for the others, and its images have to be those of the others.

        The first one has computed the features of all; the rest of the time is for as many folds as are left.
        """
        left = [n for n in range(1, self.count + 1) if not (self.output / fold_folder(n) / RESULTS).is_file()]
        self.of_fold.ends = self.deadline.end_of_part(len(left))
        self.data = run.data
        self.settings = replace(self.settings, **{name: getattr(run.settings, name) for name in DECIDED})
        now = {"digest": run.data.source["fold"]["digest"], "texts": key_of(run.classifier.prompts)}
        for name, what in SAME.items():
            if self.digests.get(name, now[name]) != now[name]:
                raise UsageError(
                    f"{what} are not those that the other folds were trained on. Bring them back as they were, or "
                    "start again with --overwrite."
                )
        self.digests = now
        self.metadata = {
            "format_version": 1,
            "cross_validation": {"folds": self.count, **now},
            "class_names": list(run.data.class_names),
            "settings": self.settings.to_json(),
            "versions": {"vlm": vlm.__version__, "python": platform.python_version()},
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def _entered(self, phase: str) -> None:
        self.enter(phase)
        if phase == TRAINING:  # from here on there is something to resume
            write_json(self.output / METADATA, self.metadata)

    def _stopped(self, number: int, stopped: Stopped) -> Stopped:
        if not (self.output / METADATA).is_file():
            return stopped
        done = str(stopped).partition("; continue with")[0].rstrip(".")
        return Stopped(f"fold {number} of {self.count} {done}. {self._resumable()}")

    def _resumable(self) -> str:
        return f"Continue with {how_to_resume(self.output, self.settings.dataset)}; folds that are finished are kept."

    def finish(self, folds: Sequence[Fold]) -> dict[str, Any]:
        """Write and print the results of all folds; returns the content of `results.json`."""
        of_folds = [fold_figures(fold) for fold in folds]
        results = {
            "folds": [
                {"fold": fold.number, "pictures": len(fold.rows), **figures}
                for fold, figures in zip(folds, of_folds, strict=True)
            ],
            "over_folds": mean_figures(of_folds),
            "out_of_fold": pooled_figures(folds, self.settings.seed),
            "versions": folds[0].results.get("versions"),
            "settings": self.settings.to_json(),
        }
        claim_results(self.output, written_by(self.count))
        look = ""
        if self.data is not None:  # it is None if all folds were finished before
            look = f"Look at {self.output / PAGE}; each fold has a page, too.\n"
            shown = results | {"readable_names": folds[0].results.get("readable_names", {})}
            write_folds_report(self.output, shown, self.data, predictions_of(folds))
        write_predictions(self.output / PREDICTIONS, folds)
        write_json(self.output / RESULTS, results)  # last: it says that the cross-validation is finished
        for fold in folds:
            delete_states(self.output / fold_folder(fold.number))  # of those that a time limit has ended
        print(folds_table(results))
        note(
            "\nThe predictions of all images, each by the model that was not trained on it, are in "
            f"{self.output / PREDICTIONS}.\n{look}For one model to use, train once on all images: its accuracy is "
            f"about that of the folds, and its own small test says little.\n  {command_to_train_once(self.settings)}"
        )
        return results


def fit_folds(
    settings: Settings,
    should_stop: Callable[[], bool] = lambda: False,
    enter: Callable[[str], None] = lambda phase: None,
    dataset: object = None,
    deadline: Deadline | None = None,
) -> dict[str, Any]:
    """Train and test a model for each fold; the arguments and errors are those of `fit`.

    Returns:
        The content of `results.json`: folds (the figures of each), over_folds (mean, standard deviation and interval),
        out_of_fold (the figures of all images together), versions, settings.
    """
    if process_count() > 1:
        raise UsageError(
            "--folds trains with one process: start it without the launcher, as python train_vlm.py. To use several "
            "machines, start one fold on each with --fold."
        )
    with output_folder(settings):
        begin(Path(settings.output_dir), settings.resume, settings.overwrite, written_by(settings.folds))
        whole = CrossValidation(settings, should_stop, enter, dataset, deadline)
        return whole.finish([whole.train(number) for number in range(1, whole.count + 1)])


def command_to_train_once(settings: Settings) -> str:
    """The command that trains one model on the images of all folds."""
    saved = RunSettings(**vars(settings) | {"batch_size": settings.batch_size or 1})
    flags = flags_to_train_once(saved, Path(settings.output_dir))
    return f"{command_of('train_vlm.py', 'vlm-train')} {shlex.join(flags)}"


def folds_table(results: dict[str, Any]) -> str:
    """The table at the end, from the content of `results.json`."""
    rows = [[name, f"{images:,}" if images else None, *values] for name, _, images, values in fold_rows(results)]
    return format_table(rows, ("", "images", *COLUMNS.values()))


def _saved_digests(output: Path) -> dict[str, Any]:
    """The digests of what an interrupted cross-validation was trained on."""
    found = read_run(output).get("cross_validation")
    return found if isinstance(found, dict) else {}
