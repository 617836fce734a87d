"""vlm/common/files.py: files that are written whole or not at all, and read although they may be damaged."""

import os

import pytest
from commands import names_in

from vlm.common.errors import UsageError, WriteError, exit_code
from vlm.common.files import read_json, replacing, write_json
from vlm.common.folders import write_folder


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "it is not JSON"),
        (b"", "it is not JSON"),
        (b"\xff\xfe{}", "it is not JSON"),
        (b"[" * 100_000, "it is nested too deep"),
        (b"1" * 10_000, "it is not JSON"),
    ],
)
def test_a_damaged_file_is_named_with_a_cure(tmp_path, content, said):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UsageError) as error:
        read_json(tmp_path / "a.json", "Copy it again.")
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'a.json'} cannot be read ({said}") and message.endswith("). Copy it again.")
    assert len(message.splitlines()) == 1


def test_a_missing_file_a_folder_and_a_byte_order_mark(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        read_json(tmp_path / "a.json", "")
    with pytest.raises(UsageError, match="is a directory"):
        read_json(tmp_path, "")
    (tmp_path / "a.json").write_text('\ufeff{"a": 1}', encoding="utf-8")
    assert read_json(tmp_path / "a.json", "") == {"a": 1}


def test_a_file_is_on_the_disk_before_it_takes_the_place_of_the_old_one(tmp_path, monkeypatch):
    """So that a power cut leaves the old or the new one; a folder is on the disk with all that is in it."""
    done = []

    def noted(name):
        original = getattr(os, name)

        def operation(*arguments):
            path = arguments[0] if isinstance(arguments[0], str | os.PathLike) else f"/proc/self/fd/{arguments[0]}"
            done.append((name, os.path.basename(os.path.realpath(path))))
            return original(*arguments)

        monkeypatch.setattr(os, name, operation)

    for name in ("fsync", "replace", "rename"):
        noted(name)
    write_json(tmp_path / "a.json", {})
    temporary = f".a.json.{os.getpid()}.tmp"
    assert done == [("fsync", temporary), ("replace", temporary), ("fsync", tmp_path.name)]
    done.clear()
    write_folder(tmp_path / "b", lambda new: (new / "weights").write_text(""))
    last = done.index(("rename", "b.new"))
    assert {("fsync", "weights"), ("fsync", "checksums.json"), ("fsync", "b.new")} <= set(done[:last])
    assert done[last + 1 :] == [("fsync", tmp_path.name)]


def test_a_file_that_cannot_be_written_is_named_with_the_reason(tmp_path):
    with pytest.raises(WriteError) as error, replacing(tmp_path / "a"):
        raise OSError(28, "No space left on device")
    assert (
        str(error.value)
        == f"{tmp_path / 'a'} could not be written (no space left on device). Make room there or allow writing, then "
        "try again."
    )
    with pytest.raises(WriteError, match="no such file or directory"):
        write_json(tmp_path / "nothing" / "a", {})
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert names_in(tmp_path) == set()


def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path):
    left = [f".{name}.{number}.tmp" for name in ("a", "b") for number in (2**22 + 1, os.getppid(), "mine")]
    for name in left:
        (tmp_path / name).write_text("")
    write_json(tmp_path / "a", {})
    assert names_in(tmp_path) == {"a", *left[1:]}


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device", "/cache/a"), Exception("I/O error (os error 122)")]
)
def test_a_full_disk_anywhere_else_is_said_in_one_line(capsys, error):
    """Such as in the caches of libraries, which raise errors of their own."""

    def fail():
        raise error

    assert exit_code(fail) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: ") and said.endswith("could not be written. Make room, then run it again.")
