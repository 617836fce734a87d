"""The output folder: it is made, and no other run in it is lost. Imported before torch, so it needs no package."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vlm.common import UsageError, is_main_process
from vlm.config import METADATA, RESULTS, WRITTEN, Settings


def check_output(settings: Settings) -> None:
    """Check that no earlier run would be lost, and that no later run would take the results for a class of images.

    Raises:
        UsageError: the folder holds a run that is neither resumed nor overwritten, or lies in the folder of the images.
    """
    output = Path(settings.output_dir)
    if (
        settings.dataset
        and Path(settings.dataset).is_dir()
        and output.resolve().is_relative_to(Path(settings.dataset).resolve())
    ):
        raise UsageError(
            f"--output-dir {output} is in the folder of --dataset {settings.dataset}: the results would be taken for a "
            "class of images. Choose a folder next to it."
        )
    if settings.overwrite:
        return
    if (output / RESULTS).exists():
        todo = (
            "there is nothing to resume; start again with --overwrite"
            if settings.resume
            else "choose another --output-dir, or --overwrite it"
        )
        raise UsageError(f"{output} holds a finished run: {todo}.")
    if (output / METADATA).exists() and not settings.resume:
        raise UsageError(
            f"{output} holds an interrupted run: continue it with --resume, or delete it with --overwrite."
        )


@contextmanager
def output_folder(settings: Settings) -> Iterator[None]:
    """Make the output folder. If the block ends in an error before the run has begun, it is removed again.

    A run has begun when `METADATA` is there. Only what was not there before is removed. Other processes than the main
    one only check.

    Raises:
        UsageError: the folder cannot be written, or holds a run that is neither resumed nor overwritten.
    """
    check_output(settings)
    if not is_main_process():
        yield
        return
    output = Path(settings.output_dir)
    made = [folder for folder in (output, *output.parents) if not folder.exists()]
    try:
        _make(output)
        if settings.overwrite:
            _clear(output)
        yield
    except BaseException:
        if made and output.is_dir() and not (output / METADATA).exists():
            _clear(output)
            with suppress(OSError):  # not empty: it holds files of somebody else
                for folder in made:
                    folder.rmdir()
        raise


def _make(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise UsageError(
            f"--output-dir {output} cannot be written ({error.strerror}): choose another folder."
        ) from error


def _clear(output: Path) -> None:
    for name in WRITTEN:
        path = output / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
