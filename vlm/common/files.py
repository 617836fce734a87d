"""Files that are written whole or not at all, and read although they may be damaged."""

import errno
import glob
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vlm.common.errors import UsageError, WriteError, first_line, reason, write_failure


@contextmanager
def replacing(path: str | Path, durable: bool = True) -> Iterator[Path]:
    """Write a file whole or not at all.

    Args:
        durable: after a power cut there is the old file or the new one. Without it the file may be damaged then, so
            that its reader has to check it.

    Yields:
        A path next to the file, which takes the place of the file if the block ends without an error.

    Raises:
        WriteError: it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        if durable:
            _delete_leftovers(path)
        try:
            yield temporary
            if durable:
                sync(temporary)
            os.replace(temporary, path)
            if durable:
                sync(path.parent)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def _delete_leftovers(path: Path) -> None:
    """Delete what processes that were killed have left of a file."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        number = left.name.rsplit(".", 2)[1]
        if number.isdigit() and not _is_running(int(number)):
            left.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return True


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn errors of the system, and those of libraries in Rust, into `WriteError`."""
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        failure = write_failure(error)
        if failure is None:
            raise
        raise WriteError(path, failure) from error


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk.

    Raises:
        OSError: they cannot be written there. If the file system cannot wait, or the folder is one in which this user
            may write but not read, nothing is raised.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file whole or not at all; a number that JSON lacks (NaN, infinity) becomes null, and a surrogate,
    such as a byte of a name that is not UTF-8, its escape."""
    with replacing(path) as temporary:
        text = json.dumps(_finite(values), indent=2, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def read_json(path: Path, cure: str) -> Any:
    """The content of a JSON file that may be damaged or made by somebody else.

    Args:
        cure: what the user can do if it cannot be read; the end of the message.

    Raises:
        UsageError: it cannot be read, is not JSON, or is nested too deep.
    """
    try:
        if path.is_fifo():  # reading it would wait for ever
            raise ValueError("it is a pipe")
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError:
        problem = "it is nested too deep"
    except OSError as error:
        problem = reason(error)
    except ValueError as error:  # not UTF-8, not JSON, or a number with thousands of digits
        problem = f"it is not JSON: {first_line(error)}"
    raise UsageError(f"{path} cannot be read ({problem}). {cure}")


def cache_folder() -> Path:
    """The folder of everything that is kept between runs: `VLM_CACHE`, or one in the user's cache folder."""
    base = os.environ.get("VLM_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "vlm")
    return Path(base).expanduser()


def _finite(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and values - values != 0 else values
