"""The one way to load something from a model's folder: nothing is downloaded, no code of it is run or asked about."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers

from vlm.common import RunError, UsageError, is_out_of_memory, one_line
from vlm.data import read_object

CHOOSE_ANOTHER = "Choose another model, see --list-models."
LONGEST_REASON = 200  # characters of a library's message


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and tables, which repeat what is said here in one line."""
    log = transformers.utils.logging
    bars, level = log.is_progress_bar_enabled(), log.get_verbosity()
    log.disable_progress_bar()
    log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


@contextmanager
def blaming(what: str, cure: str) -> Iterator[None]:
    """Turn any error of a library into a message: what is wrong, the reason in parentheses, and the cure. Quietly.

    Raises:
        UsageError: anything went wrong inside, except that memory ran out.
    """
    try:
        with quiet():
            yield
    except (UsageError, RunError):
        raise
    except Exception as error:  # a damaged file makes the libraries raise almost anything
        if is_out_of_memory(error):
            raise
        raise UsageError(f"{what} ({brief(error)}). {cure}") from error


def brief(error: BaseException) -> str:
    """What an error says, in one line that is not too long."""
    text = one_line(error)
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON].rstrip()} ..."


def load_pretrained(loader: Any, folder: Path, **options: Any) -> Any:
    """`loader.from_pretrained` of a local folder.

    Raises:
        UsageError: the folder asks for code of its own.
        Exception: whatever transformers raises if the files are damaged.
    """
    try:
        with quiet():
            return loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except ValueError as error:
        if "trust_remote_code" in str(error):
            files = " and ".join(_naming_code(folder)) or "its files"
            raise UsageError(
                f"{folder} needs program code that comes with the model (auto_map in {files}). Such code is never run "
                f"here. {CHOOSE_ANOTHER}"
            ) from error
        raise


def _naming_code(folder: Path) -> list[str]:
    """The settings files of a folder that name code."""
    return [path.name for path in sorted(folder.glob("*config.json")) if "auto_map" in read_object(path)]
