"""vlm/common/folders.py: a folder is replaced as a whole, whoever reads or kills."""

import json
import os
import shutil
import threading

import pytest
from commands import names_in

from vlm.common import WriteError, existing, read_folder, recover, write_folder
from vlm.common import folders as module
from vlm.common.checksums import CHECKSUMS


def put(folder, text, **more):
    write_folder(folder, lambda new: (new / "text").write_text(text), **more)


@pytest.fixture(params=["exchange", "renames"])
def way(request, monkeypatch):
    """Both ways in which two folders are exchanged: in one step, and where the system has none."""
    if request.param == "renames":
        monkeypatch.setattr(module, "exchange", lambda one, other: False)
    return request.param


def test_a_folder_is_replaced_and_nothing_else_is_left(tmp_path, way):
    for text in ("one", "two", "three"):
        put(tmp_path / "a", text)
        assert (tmp_path / "a" / "text").read_text() == text and names_in(tmp_path) == {"a"}
    assert json.loads((tmp_path / "a" / CHECKSUMS).read_text()) == {"text": "crc32:46c5d8f5"}


def test_the_one_before_is_kept_where_that_is_asked_for(tmp_path, way):
    for text in ("one", "two", "three"):
        put(tmp_path / "a", text, previous=tmp_path / "b")
    assert [(tmp_path / name / "text").read_text() for name in ("a", "b")] == ["three", "two"]
    assert names_in(tmp_path) == {"a", "b"}


def test_what_is_in_its_place_may_be_a_file_or_a_link(tmp_path, way):
    """The folder that a link leads to belongs to somebody else."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "photo").write_text("")
    (tmp_path / "link").symlink_to("theirs")
    (tmp_path / "file").write_text("")
    for name in ("link", "file"):
        put(tmp_path / name, "one")
    assert names_in(tmp_path) == {"theirs", "link", "file"} and names_in(tmp_path / "theirs") == {"photo"}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Exception("I/O (os error 28)")])
def test_a_folder_that_cannot_be_filled_leaves_the_old_one_and_takes_no_room(tmp_path, error):
    """Libraries that are written in Rust raise no OSError."""
    put(tmp_path / "a", "one")

    def fail(new):
        (new / "half").write_text("half")
        raise error

    with pytest.raises(WriteError) as caught:
        write_folder(tmp_path / "a", fail)
    assert (caught.value.path, caught.value.reason) == (tmp_path / "a", "no space left on device")
    assert names_in(tmp_path) == {"a"} and (tmp_path / "a" / "text").read_text() == "one"
    with pytest.raises(KeyError):
        write_folder(tmp_path / "a", lambda new: {}["a mistake"])


class Killed(BaseException):
    """The process ends here: nothing after it happens."""


@pytest.mark.parametrize("number", range(1, 30))
def test_a_kill_at_any_file_operation_leaves_a_whole_folder(tmp_path, monkeypatch, way, number):
    """Before and after each operation, a reader finds the old or the new, and the next writer is not in its way."""
    for text in ("zero", "one"):
        put(tmp_path / "a", text, previous=tmp_path / "b")
    with monkeypatch.context() as patched:
        ended = kill_at(patched, number, lambda: put(tmp_path / "a", "two", previous=tmp_path / "b"))
    assert (existing(tmp_path / "a") / "text").read_text() in ("one", "two")
    assert ended or (existing(tmp_path / "b") / "text").read_text() in ("zero", "one")
    put(tmp_path / "a", "three", previous=tmp_path / "b")
    assert (tmp_path / "a" / "text").read_text() == "three"
    assert (tmp_path / "b" / "text").read_text() in ("one", "two") and names_in(tmp_path) == {"a", "b"}


def kill_at(patched, number, work):
    """Do the work up to one of its file operations; returns whether it came to its end before."""
    count = iter(range(1, 10_000))

    def counted(original):
        def operation(*arguments, **options):
            position = next(count)
            if position >= number:  # also what is done on the way out does not happen
                raise Killed
            return original(*arguments, **options)

        return operation

    for place, name in ((os, "rename"), (os, "replace"), (os, "fsync"), (os, "mkdir"), (shutil, "rmtree")):
        patched.setattr(place, name, counted(getattr(place, name)))
    patched.setattr(module, "exchange", counted(module.exchange))
    patched.setattr(module, "remove", counted(module.remove))
    try:
        work()
    except Killed:
        return False
    return True


def test_a_reader_takes_the_old_one_and_changes_nothing(tmp_path):
    put(tmp_path / "a", "one")
    (tmp_path / "a").rename(tmp_path / "a.old")
    assert read_folder(tmp_path / "a", lambda folder: (folder / "text").read_text()) == "one"
    assert names_in(tmp_path) == {"a.old"}
    recover(tmp_path / "a")
    assert names_in(tmp_path) == {"a"}


def test_what_is_read_belongs_together(tmp_path):
    """The folder is replaced between two files that are read."""
    put(tmp_path / "a", "one")
    replaced = []

    def read(folder):
        first = (folder / "text").read_text()
        if not replaced:
            replaced.append(put(tmp_path / "a", "two"))
        return first, (folder / "text").read_text()

    assert read_folder(tmp_path / "a", read) == ("two", "two")
    with pytest.raises(FileNotFoundError):
        read_folder(tmp_path / "nothing", read)


def test_readers_find_a_whole_folder_at_every_moment(tmp_path):
    """Plain programs open it by its name, while it is replaced again and again."""
    if not module.exchange(*(folder for folder in (tmp_path / "x", tmp_path / "y") if folder.mkdir() is None)):
        pytest.skip("this file system cannot exchange two names in one step")
    put(tmp_path / "a", "0")
    stop = threading.Event()

    def replace():
        for number in range(200):
            put(tmp_path / "a", str(number))
        stop.set()

    writer = threading.Thread(target=replace)
    writer.start()
    seen = 0
    while not stop.is_set():
        assert (tmp_path / "a").is_dir()
        seen += 1
    writer.join()
    assert seen > 100
