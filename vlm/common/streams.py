"""stdout and stderr, which take any text and whose reader may go away."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def any_text() -> Iterator[None]:
    """Let stdout and stderr escape what their encoding lacks, instead of ending the program: ü becomes \\xfc on a
    terminal that knows ASCII only. Afterwards they are as they were."""
    before = [(stream, stream.errors) for stream in (sys.stdout, sys.stderr) if hasattr(stream, "reconfigure")]
    for stream, _ in before:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in before:
            with suppress(OSError, ValueError):  # closed, or its reader has ended
                stream.reconfigure(errors=errors)


def drop_closed_pipes() -> None:
    """If the reader of stdout or stderr (head, less) has ended, send what is left to nowhere, so that Python's own end
    does not complain about it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            with suppress(OSError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
