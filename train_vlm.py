#!/usr/bin/env python3
"""Train a small vision-language model to classify images.

python train_vlm.py --demo
python train_vlm.py --model HuggingFaceTB/SmolVLM-256M-Instruct --dataset my_images/
"""

import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.common import CONTINUED, UsageError, command_of, exit_code, lazy_names, switches_as_before
from vlm.config import (
    IN_MEMORY,
    RESULTS,
    RunSettings,
    Settings,
    flags_to_train_further,
    flags_to_train_once,
    parse_arguments,
    read_run,
    read_settings,
    resolve,
    split_names,
    user_path,
)
from vlm.machine import wait_politely

if TYPE_CHECKING:
    from vlm.classifier import vlm_collate_fn
    from vlm.evaluation import evaluate_vlm_model

__all__ = ["evaluate_vlm_model", "main", "train_on", "vlm_collate_fn"]


# `from train_vlm import vlm_collate_fn` works, and `--help` does not load torch.
__getattr__ = lazy_names(__name__, {"vlm.classifier": ["vlm_collate_fn"], "vlm.evaluation": ["evaluate_vlm_model"]})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Works in any thread, and leaves the switches of libraries alone."""
    given = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    with switches_as_before():
        return exit_code(lambda: train(given), debug=given.get("debug", False))


def train_on(dataset: Any, **settings: Any) -> dict[str, Any]:
    """Train on a dataset that a program has made, as in a notebook.

        results = train_on(my_dataset_dict, model="HuggingFaceTB/SmolVLM-256M-Instruct", epochs=3, output_dir="results")

    Args:
        dataset: a `Dataset` or `DatasetDict` of the datasets library, or the name of a dataset as in --dataset. Columns
            and splits are found as in one that is loaded by its name.
        settings: the flags by name: batch_size=4 is --batch-size 4.

    Returns:
        The content of `results.json`.

    Raises:
        UsageError: dataset or settings with which the run cannot start. A RunError is one that had to stop.
        TypeError: there is no such flag.
    """
    if unknown := settings.keys() - {item.name for item in fields(Settings)}:
        raise TypeError(f"train_on() has no setting {', '.join(sorted(unknown))}; see docs/options.md for all flags")
    if "dataset" in settings:
        raise TypeError("train_on() takes the dataset as its first argument")
    if isinstance(settings.get("class_names"), str):
        settings["class_names"] = split_names([settings["class_names"]])
    named = isinstance(dataset, (str, os.PathLike))
    if not named and settings.get("streaming"):
        raise UsageError("--streaming reads a dataset by its name: give the name in the place of the dataset.")
    given = settings | ({} if settings.get("resume") else {"dataset": str(dataset) if named else IN_MEMORY})
    with switches_as_before():
        return train(given, None if named else dataset)


def train(given: dict[str, Any], dataset: object = None) -> dict[str, Any]:
    """Train with the flags that were given.

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
    from vlm.training import StopSignals, check_output, clean_up

    output = Path(user_path(given.get("output_dir", Settings.output_dir)))
    clean_up(output)
    settings = resolve(given, saved_settings(output, given.get("epochs")) if given.get("resume") else None)
    check_output(settings)
    signals = StopSignals(settings.output_dir)
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
