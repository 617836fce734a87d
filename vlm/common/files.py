"""Files and folders that are written whole or not at all."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlm.common.errors import RunError, UsageError, first_line, reason


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file whole or not at all.

    Yields:
        A path next to the file, which takes the place of the file if the block ends without an error.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file whole or not at all; a number that JSON lacks (NaN, infinity) becomes null."""
    with replacing(path) as temporary:
        text = json.dumps(_finite(values), indent=2, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path, cure: str) -> Any:
    """The content of a JSON file that may be damaged or made by somebody else.

    Args:
        cure: what the user can do if it cannot be read; the end of the message.

    Raises:
        UsageError: it cannot be read, is not JSON, or is nested too deep.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError:
        problem = "it is nested too deep"
    except OSError as error:
        problem = reason(error)
    except ValueError as error:  # not UTF-8, not JSON, or a number with thousands of digits
        problem = f"it is not JSON: {first_line(error)}"
    raise UsageError(f"{path} cannot be read ({problem}). {cure}")


def _finite(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and values - values != 0 else values


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill a new folder, then put it in the place of the old one, so that a reader never sees half of it.

    A run that is killed between the two renames leaves the old folder as `NAME.old`; `recover` puts it back.

    Args:
        folder: what is replaced.
        write: fills the new folder, whose path it is given.

    Raises:
        RunError: the folder cannot be written.
    """
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        write(new)
        usual_modes(new)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise RunError(
            f"{folder} cannot be written: {error}. What was saved before is unharmed; make room, then continue with "
            "--resume."
        ) from error


def recover(folder: Path) -> None:
    """Undo what a killed `write_folder` left."""
    old = folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():
        os.replace(old, folder)


def usual_modes(folder: Path) -> None:
    """Give the files of a folder the user's usual mode: safetensors writes them readable by their owner only."""
    mask = os.umask(0o022)
    os.umask(mask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~mask)
