"""The errors that users meet, and the one place that turns them into a message and an exit code.

Exit codes: 0 done, 1 a run that failed, 2 wrong usage, 130 stopped by the user.
"""

import difflib
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vlm.common.processes import OTHER_ENDED, is_main_process, is_of_another_process, tell_launcher
from vlm.common.streams import any_text, drop_closed_pipes
from vlm.common.text import CONTINUED, message_text

ERROR = "error: "  # how messages of errors begin
WHILE = "while "  # how notes begin that say what was being done


class Worded:
    """What errors have whose message says all that a user needs: a notebook shows it without a traceback.

    Attributes:
        debug: True shows the traceback, too.
    """

    debug = False

    def _render_traceback_(self: Any) -> list[str]:
        """Called by IPython. Notes about what was being done (see `doing`) are left out, as on the command line."""
        if self.debug:
            return traceback.format_exception(self)
        notes = [note for note in getattr(self, "__notes__", []) if not note.startswith(WHILE)]
        return [f"{type(self).__name__}: {_own_text(self)}", *notes]


class UsageError(Worded, Exception):
    """The command or its input is wrong: what was found, what was expected, what to do next. Exit code 2."""


class RunError(Worded, Exception):
    """A run that was set up correctly could not go on. Exit code 1."""


class WriteError(RunError):
    """A file or folder could not be written, such as on a full disk. What was there before is unharmed.

    Attributes:
        path: the file or folder. reason: why, in a few words.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(f"{path} could not be written ({reason}). Make room there or allow writing, then try again.")
        self.path, self.reason = path, reason


class Stopped(Worded, KeyboardInterrupt):
    """The user stopped the run; the message says what is left of it. Exit code 130.

    It is no `Exception`, so that no `except Exception` catches it.
    """


def one_line(error: BaseException) -> str:
    """All that an error says, in one line; the name of its type if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of what an error says, for libraries whose errors go on for pages; else the name of its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def reason(error: BaseException) -> str:
    """Why a file could not be read, in one line. Of an error of the system: without its number and the file's name."""
    if isinstance(error, WriteError):
        return error.reason
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[:1].lower() + error.strerror[1:]
    return one_line(error)


def write_failure(error: BaseException) -> str | None:
    """Why something could not be written, in a few words; None if the error is about something else.

    Errors of safetensors and tokenizers, which are written in Rust, are no `OSError`, but name its number.
    """
    if isinstance(error, OSError):
        return reason(error)
    found = re.search(r"\(os error (\d+)\)", str(error))
    return reason(OSError(int(found[1]), os.strerror(int(found[1])))) if found else None


def did_you_mean(given: str, known: Sequence[str]) -> str:
    """What to add to a message about an unknown name: the known name that is most like it, or nothing."""
    close = difflib.get_close_matches(given, known, n=1) or [name for name in known if name.lower() == given.lower()]
    return f" Did you mean {close[0]}?" if close else ""


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Say in the message of an error that nobody expects what was being done, such as "reading --dataset images/"."""
    try:
        yield
    except Exception as error:
        error.add_note(f"{WHILE}{what}")
        raise


FULL_DISK = tuple(reason(OSError(number, os.strerror(number))) for number in (errno.ENOSPC, errno.EDQUOT))
OUT_OF_MEMORY = (
    "out of memory. Try in this order: a smaller --batch-size (with a larger --gradient-accumulation-steps the result "
    "is the same), a smaller --eval-batch-size, --tune connector instead of lora or full, --dtype bfloat16, "
    "a smaller --model."
)


def exit_code(command: Callable[[], object], debug: bool = False) -> int:
    """Run a command and return its exit code. An error prints one or two lines instead of a traceback.

    Args:
        debug: raise every error, so that its traceback is shown.
    """
    with any_text():
        try:
            command()
            return 0
        except BrokenPipeError:  # the reader of a pipe (head, less) has ended: there is nobody to tell
            drop_closed_pipes()
            return 1
        except (Exception, KeyboardInterrupt) as error:
            if debug:
                raise
            message, code = _explain(error)
            if _is_to_be_said(error, message):
                print(message_text(message), file=sys.stderr)
            return code


def _is_to_be_said(error: BaseException, message: str) -> bool:
    """Whether this process prints a message. Of several that train together the launcher is told, and says it."""
    told = tell_launcher(message.removeprefix(ERROR))
    if is_main_process():
        return message != ERROR + OTHER_ENDED
    return not told and not isinstance(error, UsageError | Stopped)


def _explain(error: BaseException) -> tuple[str, int]:
    if isinstance(error, UsageError):
        return f"error: {_own_text(error)}", 2
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "stopped.", 130
    if isinstance(error, RunError):
        return f"error: {_own_text(error)}", 1
    if is_of_another_process(error):
        return ERROR + OTHER_ENDED, 1
    if is_out_of_memory(error):
        return f"error: {OUT_OF_MEMORY}", 1
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("vlm"):
        return (
            f"error: {sys.executable} has no package {error.name}. Start with ./run_vlm_training.sh, which sets up an "
            "environment that has all packages, or use the Python in it: .venv/bin/python.",
            2,
        )
    if write_failure(error) in FULL_DISK:
        where = f" {error.filename}" if isinstance(error, OSError) and error.filename else ""
        return f"error: {write_failure(error)}:{where} could not be written. Make room, then run it again.", 1
    return _explain_unexpected(error), 1


def _own_text(error: BaseException) -> str:
    """What an error says. In one of a process that prepares images, torch puts a traceback before it."""
    text = str(error)
    if not text.startswith("Caught ") or "Original Traceback" not in text:
        return text
    last = text.rstrip().splitlines()[-1]  # the type and what was said
    return last.partition(": ")[2] or last


def _explain_unexpected(error: BaseException) -> str:
    """What was being done, what a library or the system said about it, and what to do."""
    phase = next(iter(getattr(error, "__notes__", [])), "")
    before = f"error: {phase}: " if phase else "error: "
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        cure = "Check that this place exists, that you may read and write it, and that its disk has room."
        return f"{before}{error.filename}: {reason(error)}.{CONTINUED}{cure}"
    cure = (
        "If your flags and files are right, this is a mistake of the program: run it again with --debug, and report "
        "what it prints."
    )
    return f"{before}{type(error).__name__}: {first_line(error)}{CONTINUED}{cure}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out on the CPU, CUDA or MPS."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
