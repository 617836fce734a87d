"""What users read of errors, and the exit codes."""

import errno
import io
import os
import sys

import pytest
from torch.utils.data import DataLoader

from vlm.common import RunError, Stopped, UsageError, doing, exit_code


def raising(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UsageError("--x 1: expected 2."), 2, "error: --x 1: expected 2."),
        (RunError("the loss is nan."), 1, "error: the loss is nan."),
        (Stopped("stopped after step 3."), 130, "stopped after step 3."),
        (KeyboardInterrupt(), 130, "stopped."),
        (UsageError("a\x1b[2Jb\nerror: c: no such file."), 2, "error: a [2Jb error: c: no such file."),
    ],
)
def test_an_error_that_is_known_is_one_line(error, code, message, capsys):
    assert exit_code(raising(error)) == code
    assert capsys.readouterr() == ("", f"{message}\n")


def test_an_error_of_the_system_names_the_file_and_what_was_being_done(capsys):
    def command():
        with doing("reading the dataset"), doing("reading a table"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/a/b")

    assert exit_code(command) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == "error: while reading a table: /a/b: permission denied."
    assert "you may read and write it" in second


def test_of_an_error_with_fifty_lines_the_first_is_printed(capsys):
    assert exit_code(raising(RuntimeError("\n".join(f"line {i}" for i in range(50))))) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0] == "error: RuntimeError: line 0"


def test_what_was_being_done_is_not_said_of_errors_that_say_what_to_do(capsys):
    def command():
        with doing("reading the dataset"):
            raise UsageError("no such column.")

    assert exit_code(command) == 2
    assert capsys.readouterr().err == "error: no such column.\n"


def test_a_command_that_prints_what_the_terminal_lacks_is_done(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert exit_code(lambda: print("Straße")) == 0
    stream.flush()
    assert stream.buffer.getvalue() == b"Stra\\xdfe\n" and stream.errors == "strict"


def fail(item):
    raise RunError(f"image {item} cannot be read: repair it.")


def test_an_error_in_a_loader_process_is_as_short_as_anywhere(capsys):
    """torch raises it again with a traceback as its text."""

    def load():
        next(iter(DataLoader([0, 1], batch_size=None, num_workers=1, collate_fn=fail)))

    assert exit_code(load) == 1
    assert capsys.readouterr().err == "error: image 0 cannot be read: repair it.\n"
