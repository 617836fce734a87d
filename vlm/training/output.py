"""The output folder: it is made, and no other run in it is lost. Imported before torch, so it needs no package."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vlm.common import UsageError, is_main_process, note, reason
from vlm.config import BEST_MODEL, METADATA, PREVIOUS_RUN, RESULTS, Settings, user_path, written_by
from vlm.training.lock import check_unlocked, locked
from vlm.training.run_files import (
    files_of_others_in_folders,
    files_of_run,
    foreign_files,
    has_work,
    is_unsettled,
    list_tracked,
    settle,
)


def clean_up(output: Path) -> None:
    """Clean up what a killed run has left in an output folder (see `settle`), before anything in it is read.

    Raises:
        UsageError: another run works in it, or it cannot be written.
    """
    if is_main_process() and output.is_dir() and is_unsettled(output):
        _check_writable(output)
        with locked(output):
            settle(output)


def check_output(settings: Settings) -> None:
    """Check that no earlier run would be lost, and that no later run would take the results for a class of images.

    Raises:
        UsageError: the folder holds a run that is neither resumed nor overwritten, or files that no run has written.
        UsageError: it lies in the folder of the images, or is no folder for the results of a run.
        UsageError: another run works in it.
    """
    output = Path(settings.output_dir)
    _check_place(output, settings)
    if is_main_process():
        check_unlocked(output)
    _check_content(output, settings)


def check_place(settings: Settings) -> None:
    """Check that no later run would take what is written for a class of images.

    Raises:
        UsageError: the folder lies in that of the images, is no folder for results, or cannot be written.
    """
    output = Path(settings.output_dir)
    _check_place(output, settings)
    there = next(folder for folder in (output, *output.absolute().parents) if os.path.lexists(folder))
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise UsageError(f"--output-dir {output} cannot be written: choose another folder.")


def why_not_here(settings: Settings) -> str | None:
    """Why a run could not begin in its output folder as that is now, in words; None if it could. Nothing is changed."""
    try:
        check_output(settings)
    except UsageError as error:
        return str(error)
    return None


def _check_place(output: Path, settings: Settings) -> None:
    place, here, home = output.resolve(), Path.cwd(), Path(user_path("~")).resolve()
    if place == home or place in here.parents:
        what = "your home folder" if place == home else "a folder above the current one"
        raise UsageError(f"--output-dir {output} is {what}: choose a folder only for the results, such as vlm_results.")
    images = settings.dataset and Path(settings.dataset)
    if images and images.is_dir() and place.is_relative_to(images.resolve()):
        raise UsageError(
            f"--output-dir {output} is in the folder of --dataset {settings.dataset}: the results would be taken for a "
            "class of images. Choose a folder next to it."
        )


def _check_content(output: Path, settings: Settings) -> None:
    foreign = foreign_files(output, written_by(settings.folds if settings.trains_folds else None))
    if settings.overwrite or settings.resume:
        foreign += files_of_others_in_folders(output)
    if foreign:
        raise UsageError(
            f"{output} holds {', '.join(foreign)}, which no run of this program has written and a run would overwrite: "
            "move what is there away, or choose another --output-dir."
        )
    if settings.overwrite:
        _check_not_needed(output, settings)
    elif (output / RESULTS).exists() and not (settings.resume and may_go_on(output)):
        todo = "there is nothing to resume" if settings.resume else "choose another --output-dir, or --overwrite it"
        goes_on = ", or continue it after its --time-limit with --resume" if may_go_on(output) else ""
        raise UsageError(f"{output} holds a finished run: {todo}{goes_on}.")
    elif (output / METADATA).exists() and not settings.resume:
        raise UsageError(
            f"{output} holds an interrupted run: continue it with --resume, or delete it with --overwrite."
        )
    elif not (output / METADATA).exists() and has_work(output):
        raise UsageError(without_metadata(output))


def can_go_on(results: Any) -> bool:
    """Whether a finished run keeps its state, because only its --time-limit has ended the training.

    Args:
        results: the content of `results.json`.
    """
    ended = results.get("ended_early") if isinstance(results, dict) else None
    return isinstance(ended, dict) and ended.get("by") == "time_limit"


def may_go_on(output: Path) -> bool:
    """The same of the run in an output folder, of which nothing else is known."""
    with suppress(OSError, ValueError, RecursionError):
        return can_go_on(json.loads((output / RESULTS).read_text(encoding="utf-8")))
    return False


def check_resumable(output: Path) -> None:
    """Check that there is a run to continue.

    Raises:
        UsageError: there is none, or its metadata are gone.
    """
    if not os.path.lexists(output / METADATA):
        if has_work(output):
            raise UsageError(f"--resume: {without_metadata(output)}")
        raise UsageError(f"--resume: {output} holds no run to continue. Leave out --resume to start one.")


def without_metadata(output: Path) -> str:
    """What to do about a run whose metadata are gone."""
    copy = output / BEST_MODEL / METADATA
    cure = f"Copy {copy} there, then continue with --resume" if copy.is_file() else "Copy the folder again"
    return f"{output} holds a run, but its {METADATA} is missing. {cure}, or delete the run with --overwrite."


def _check_not_needed(output: Path, settings: Settings) -> None:
    """Check that the run does not start from what it overwrites."""
    read = {"--model": settings.model, "--dataset": settings.dataset, "--image-folder": settings.image_folder}
    for flag, value in read.items():
        needed = Path(value).resolve() if value else None
        if needed and any(needed.is_relative_to((output / name).resolve()) for name in files_of_run(output)):
            raise UsageError(
                f"{flag} {value} is part of the run that --overwrite deletes: choose another --output-dir."
            )


@contextmanager
def output_folder(settings: Settings) -> Iterator[None]:
    """Make the output folder, and keep other runs out of it.

    If the block ends in an error before the run has begun, nothing of it is left, and an earlier run that it would
    have overwritten is unharmed (see vlm/training/run_files.py). Other processes than the main one only check.

    Raises:
        UsageError: the folder cannot be written, is in use, or holds a run that is neither resumed nor overwritten.
    """
    output = Path(settings.output_dir)
    if not is_main_process():
        check_output(settings)
        yield
        return
    _check_place(output, settings)
    made = [folder for folder in (output, *output.parents) if not folder.exists()]
    try:
        _make(output)
        with locked(output):
            settle(output)
            _check_content(output, settings)
            with _settled_afterwards(output):
                yield
    except BaseException:
        with suppress(OSError):  # not empty: it holds a run that has begun, or files of somebody else
            for folder in made:
                folder.rmdir()
        raise


@contextmanager
def _settled_afterwards(output: Path) -> Iterator[None]:
    try:
        yield
        list_tracked(output)
    except BaseException:
        with suppress(OSError, UsageError):  # such as a full disk: the next run cleans up
            list_tracked(output)
            settle(output)
            if (output / PREVIOUS_RUN).is_dir():
                note(f"The earlier run is kept in {output / PREVIOUS_RUN} until the new one has a model.")
        raise


def _make(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(output, error) from error
    _check_writable(output)


def _check_writable(output: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise _not_writable(output, error) from error


def _not_writable(output: Path, error: OSError) -> UsageError:
    return UsageError(f"--output-dir {output} cannot be written ({reason(error)}): choose another folder.")
