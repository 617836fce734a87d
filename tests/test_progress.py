"""Notes and progress, on a terminal and without one."""

import io
import os
import sys

import pytest

from vlm.common import progress as module
from vlm.common.files import replacing
from vlm.common.progress import Bar, note, with_bar


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets, by clock["now"]: of the plain lines, and of tqdm."""
    now = {"now": 100.0}
    monkeypatch.setattr(module, "monotonic", lambda: now["now"])
    monkeypatch.setattr("tqdm.std.time", lambda: now["now"])
    return now


def test_note_goes_to_stderr_of_the_main_process_only(capsys, monkeypatch):
    note("one")
    monkeypatch.setenv("RANK", "0")
    note("two")
    monkeypatch.setenv("RANK", "1")
    note("three")
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "one\ntwo\n"


def test_in_a_notebook_a_note_is_not_shown_as_an_error(capsys, monkeypatch):
    stream = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})()
    monkeypatch.setattr(sys, "stdout", stream)
    note("epoch 1")
    assert stream.getvalue() == "epoch 1\n" and capsys.readouterr().err == ""


def test_without_a_terminal_lines_come_every_ten_seconds_with_rate_and_time_left(capsys, clock):
    bar = Bar(2000, "Training")
    for _ in range(100):
        clock["now"] += 0.5
        bar.update(10, loss=0.31234, lr=2e-4)
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Training: 200/2,000 images (10%), 20.0 images/s, 01:30 left, loss=0.312, lr=0.0002"
    assert len(lines) == 6
    assert lines[-1] == "Training: 1,000/2,000 images (50%), 20.0 images/s, took 00:50, loss=0.312, lr=0.0002"


def test_a_quick_loop_prints_nothing_without_a_terminal(capsys, clock):
    with Bar(3, "Reading") as bar:
        clock["now"] += 1.0
        bar.update(3)
    assert capsys.readouterr().err == ""


def test_work_of_an_earlier_run_does_not_count_in_the_rate(capsys, clock):
    bar = Bar(1000, "Training", initial=900)
    clock["now"] += 10
    bar.update(50)
    assert "950/1,000 images (95%), 5.0 images/s, 00:10 left" in capsys.readouterr().err


def test_what_is_done_in_a_pause_does_not_count_in_the_rate(capsys, clock):
    with Bar(400, "Training") as bar:
        with bar.paused():
            clock["now"] += 160  # a test before the first step
        for _ in range(2):
            clock["now"] += 20
            bar.update(200)
            with bar.paused():
                clock["now"] += 30
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == "Training: 200/400 images (50%), 10.0 images/s, 00:20 left"
    assert last == "Training: 400/400 images (100%), 10.0 images/s, took 00:40"


def test_a_pause_does_not_count_on_a_terminal_either(monkeypatch, clock):
    def work():
        with Bar(40, "Training") as bar:
            with bar.paused():
                clock["now"] += 160
            clock["now"] += 2
            bar.update(20)

    text = on_a_terminal(monkeypatch, (24, 100), work)
    assert "20/40 [00:02<00:02, 10.00 images/s]" in text


def test_unknown_total_and_slow_rate_are_shown(capsys, clock):
    bar = Bar(None, "Loading", unit="files")
    clock["now"] += 20
    bar.update(1)
    assert capsys.readouterr().err == "Loading: 1 files, 0.05 files/s\n"


def on_a_terminal(monkeypatch, size, action):
    """What an action writes to a terminal of so many (rows, columns)."""
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, size)
    with os.fdopen(writer, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        action()
        stream.flush()
        os.set_blocking(reader, False)
        pieces = []
        with os.fdopen(reader, "rb", buffering=0) as screen:
            while piece := screen.read(4096):
                pieces.append(piece)
    return b"".join(pieces).decode().replace("\r\n", "\n")


def train_a_little():
    with Bar(4, "Training", "steps") as bar:
        bar.update(2, loss=0.5)
        note("a note")
        bar.update(2, loss=0.25)


def test_on_a_terminal_a_bar_shows_rate_and_figures_and_notes_stand_above_it(monkeypatch):
    text = on_a_terminal(monkeypatch, (24, 100), train_a_little)
    assert "4/4" in text and "steps/s" in text and "loss=0.25" in text
    before, after = text.split("a note\n")
    assert before.endswith("\r"), "the bar is wiped before the note"
    assert "Training" in after, "the bar is drawn again below the note"


def test_a_terminal_without_a_size_gets_plain_lines(monkeypatch, clock):
    monkeypatch.setattr(module, "SECONDS_WORTH_A_LAST_LINE", 0.0)
    text = on_a_terminal(monkeypatch, (0, 0), train_a_little)
    assert text.startswith("a note\nTraining: 4/4 steps (100%)") and "\r" not in text


def test_progress_passes_items_through_and_counts_them(capsys, clock):
    def slow():
        for item in "abcd":
            clock["now"] += 6
            yield item

    assert list(with_bar(slow(), 4, "Predicting")) == list("abcd")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Predicting: 2/4 images (50%)") and lines[-1].startswith("Predicting: 4/4 images (100%)")


def test_batches_count_as_many_as_they_hold(capsys, clock):
    def batches():
        for size in (4, 4, 2):
            clock["now"] += 10
            yield "x" * size

    list(with_bar(batches(), 10, "Testing", count=len))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Testing: 4/10 images (40%), 0.4 images/s") and lines[-1].startswith(
        "Testing: 10/10 images"
    )


def test_other_processes_show_no_progress(capsys, clock, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    for _ in with_bar(range(5), 5, "Predicting"):
        clock["now"] += 60
    assert capsys.readouterr().err == ""


def test_replacing_leaves_the_old_file_when_the_writing_fails(tmp_path):
    path = tmp_path / "file.txt"
    with replacing(path) as beside:
        beside.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as beside:
        beside.write_text("half of the ne")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
