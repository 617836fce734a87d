#!/usr/bin/env python3
"""Train a small vision-language model to classify images.

python train_vlm.py --demo
python train_vlm.py --model HuggingFaceTB/SmolVLM-256M-Instruct --dataset my_images/
from train_vlm import train
"""

import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.common import CONTINUED, RunError, UsageError, Worded, command_of, exit_code, lazy_names, switches_as_before
from vlm.config import (
    IN_MEMORY,
    METADATA,
    RESULTS,
    RunSettings,
    Settings,
    flags_to_train_further,
    flags_to_train_once,
    from_keywords,
    parse_arguments,
    read_run,
    read_settings,
    resolve,
    say_in_python,
    user_path,
    with_flags,
)
from vlm.machine import wait_politely

if TYPE_CHECKING:
    from vlm.classifier import vlm_collate_fn
    from vlm.evaluation import evaluate_vlm_model
    from vlm.training import Result

__all__ = ["Result", "evaluate_vlm_model", "main", "train", "train_on", "vlm_collate_fn"]


# `from train_vlm import vlm_collate_fn` works, and `--help` does not load torch.
__getattr__ = lazy_names(
    __name__,
    {
        "vlm.classifier": ["vlm_collate_fn"],
        "vlm.evaluation": ["evaluate_vlm_model"],
        "vlm.training": ["Result"],
    },
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Works in any thread, and leaves the switches of libraries alone."""
    given = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    with switches_as_before():
        return exit_code(lambda: start(given), debug=given.get("debug", False))


@with_flags
def train(dataset: Any = None, **settings: Any) -> "Result | None":
    """Train, from a notebook or program, and return the finished run.

        result = train(dataset="my_images/", epochs=3, output_dir="results")

    Args:
        dataset: the name of a dataset as in --dataset; or a `Dataset` or `DatasetDict` of the datasets library, a
            pandas `DataFrame`, a list of pairs (image, label), or a dict with one of them for each split. Columns and
            splits are found as in one that is loaded by its name.
        settings: the flags by name: batch_size=4 is --batch-size 4, resume=True is --resume.

    Returns:
        The run, with metrics, paths, history, figures and classifier. None if nothing was trained here: with dry_run,
        show_data or list_models, and on processes other than the main one.

    Raises:
        UsageError: dataset or settings with which the run cannot start. It is a TypeError, too, if there is no such
            flag.
        RunError: the run had to stop.
        Stopped: it was interrupted; a `KeyboardInterrupt`. Its message says how to continue.
    """
    return _train("train", dataset, settings)


def train_on(dataset: Any, **settings: Any) -> dict[str, Any]:
    """`train`, which returns only the content of `results.json`; empty if nothing was trained here."""
    result = _train("train_on", dataset, settings)
    return result.results if result else {}


def _train(function: str, dataset: Any, settings: dict[str, Any]) -> "Result | None":
    given = from_keywords(function, settings)
    named = isinstance(dataset, str | os.PathLike)
    if dataset is not None:
        given["dataset"] = os.fspath(dataset) if named else IN_MEMORY
    if dataset is not None and not named and given.get("streaming"):
        raise UsageError("--streaming reads a dataset by its name: give the name in the place of the dataset.")
    try:
        with switches_as_before():
            results = start(given, None if named else dataset)
    except (UsageError, RunError, KeyboardInterrupt) as error:
        _say_in_python(error, given)
        raise
    if not results:
        return None
    from vlm.training import Result

    return Result(output_of(given).absolute(), results)


def _say_in_python(error: BaseException, given: dict[str, Any]) -> None:
    """Add to an error what its flags are in Python and, if there is a run to resume, how."""
    output = output_of(given)
    if isinstance(error, Worded):
        error.debug = given.get("debug", False)
    if isinstance(error, KeyboardInterrupt):
        resumable = (output / METADATA).is_file() and not (output / RESULTS).is_file()
        if resumable and given.get("dataset") != IN_MEMORY:  # whose call the error names
            error.add_note(f"In Python: train(..., resume=True, output_dir={str(output)!r})")
    else:
        say_in_python(error)


def output_of(given: dict[str, Any]) -> Path:
    """The output folder of a run with the flags that were given."""
    return Path(user_path(given.get("output_dir", Settings.output_dir)))


def start(given: dict[str, Any], dataset: object = None) -> dict[str, Any]:
    """Do what the flags ask for: train, or only look.

    Args:
        given: values by field name of `Settings`.
        dataset: see `fit`.

    Returns:
        The content of `results.json`; empty if nothing was trained here.
    """
    started = time.monotonic()
    if given.get("list_models"):
        from vlm.machine import list_models

        list_models(resolve(given))
        return {}
    if given.get("dry_run") or given.get("show_data"):
        look(given, dataset)
        return {}
    from vlm.training import StopSignals, check_output, check_trackers, clean_up

    output = output_of(given)
    clean_up(output)
    settings = resolve(given, saved_settings(output, given.get("epochs")) if given.get("resume") else None)
    check_output(settings)
    check_trackers(settings.trackers)
    signals = StopSignals(settings.output_dir, settings.dataset)
    with signals.listening():  # before the heavy imports, which take seconds
        wait_politely()
        from vlm.training import Deadline, fit, fit_folds

        train_all = fit_folds if settings.trains_folds else fit
        deadline = Deadline.of(settings, started)
        with switches_as_before():  # those of the libraries, which are imported now
            return train_all(settings, signals.should_stop, signals.enter, dataset, deadline=deadline)


def look(given: dict[str, Any], dataset: object = None) -> None:
    """Look at the data (`--show-data`) or at the run (`--dry-run`) without training."""
    settings = resolve(given)
    wait_politely()
    if settings.show_data:  # needs no torch
        from vlm.training import look_at_data as look_at
    else:
        from vlm.training import look_at_run as look_at
    with switches_as_before():
        look_at(settings, dataset)


def saved_settings(output: Path, epochs: int | None = None) -> RunSettings:
    """The settings of the interrupted run in a folder.

    Args:
        epochs: that were asked for, for the message if the run is finished.

    Raises:
        UsageError: there is no run, its metadata are damaged, or it is finished.
    """
    from vlm.training import check_resumable, may_go_on

    check_resumable(output)
    saved = read_settings(read_run(output)["settings"])
    if (output / RESULTS).is_file() and not may_go_on(output):
        once = saved.trains_folds
        flags = flags_to_train_once(saved, output) if once else flags_to_train_further(saved, output, epochs)
        command = f"{command_of('train_vlm.py', 'vlm-train')} {shlex.join(flags)}"
        if once:
            raise UsageError(
                f"--resume: {output} holds a finished cross-validation, so there is nothing to continue. "
                f"To train one model on all images:{CONTINUED}{command}"
            )
        raise UsageError(
            f"--resume: {output} holds a finished run, so there is nothing to continue. "
            f"To train {'longer' if saved.demo else 'its model further'}:{CONTINUED}{command}"
        )
    return saved


if __name__ == "__main__":
    sys.exit(main())
