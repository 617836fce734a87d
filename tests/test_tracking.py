"""Notes, progress, log.jsonl and Weights & Biases (the real client, offline)."""

import io
import json
import math
import os
import sys

import numpy as np
import pytest

from vlm.common import progress as tracking
from vlm.common.errors import UsageError
from vlm.common.files import replacing
from vlm.common.progress import Bar, RunLog, note, progress, read_log


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets, by clock["now"]."""
    now = {"now": 100.0}
    monkeypatch.setattr(tracking, "monotonic", lambda: now["now"])
    return now


@pytest.fixture
def wandb_environment(monkeypatch, tmp_path):
    """Without the login and the settings of whoever runs the tests."""
    for name in ("WANDB_API_KEY", "WANDB_DIR", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    yield monkeypatch
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()  # else the next test gets the environment of this one


def test_note_goes_to_stderr_of_the_main_process_only(capsys, monkeypatch):
    note("one")
    monkeypatch.setenv("RANK", "0")
    note("two")
    monkeypatch.setenv("RANK", "1")
    note("three")
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "one\ntwo\n"


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
    """tqdm has a clock of its own."""

    def work():
        bar = Bar(4, "Training")
        before = bar._bar.start_t
        with bar.paused():
            clock["now"] += 160
        assert bar._bar.start_t == before + 160
        bar.close()

    on_a_terminal(monkeypatch, (24, 100), work)


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
    monkeypatch.setattr(tracking, "SECONDS_WORTH_A_LAST_LINE", 0.0)
    text = on_a_terminal(monkeypatch, (0, 0), train_a_little)
    assert text.startswith("a note\nTraining: 4/4 steps (100%)") and "\r" not in text


def test_progress_passes_items_through_and_counts_them(capsys, clock):
    def slow():
        for item in "abcd":
            clock["now"] += 6
            yield item

    assert list(progress(slow(), 4, "Predicting")) == list("abcd")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Predicting: 2/4 images (50%)") and lines[-1].startswith("Predicting: 4/4 images (100%)")


def test_batches_count_as_many_as_they_hold(capsys, clock):
    def batches():
        for size in (4, 4, 2):
            clock["now"] += 10
            yield "x" * size

    list(progress(batches(), 10, "Testing", count=len))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Testing: 4/10 images (40%), 0.4 images/s") and lines[-1].startswith(
        "Testing: 10/10 images"
    )


def test_other_processes_show_no_progress(capsys, clock, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    for _ in progress(range(5), 5, "Predicting"):
        clock["now"] += 60
    assert capsys.readouterr().err == ""


def test_log_lines_are_json_and_readable_at_once(tmp_path):
    with RunLog(tmp_path / "new" / "folder", False, "", {}) as log:
        log.log("train", 3, epoch=0.5, loss=np.float32(0.5), learning_rate=1e-4, counts=np.array([1, 2]))
        log.log("validation", 3, loss=math.nan, accuracy=math.inf, per_class={"Käse": math.nan, "b": 1})
        lines = (tmp_path / "new/folder/log.jsonl").read_text(encoding="utf-8").splitlines()
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert first.pop("time") > 1.6e9
    assert first == {"kind": "train", "step": 3, "epoch": 0.5, "loss": 0.5, "learning_rate": 1e-4, "counts": [1, 2]}
    assert (second["loss"], second["accuracy"], second["per_class"]) == (None, None, {"Käse": None, "b": 1})


def test_a_resumed_log_has_no_repeated_steps_and_survives_a_half_written_line(tmp_path):
    with RunLog(tmp_path, False, "", {}) as log:
        for step in range(1, 6):
            log.log("train", step, loss=1 / step, name="line\u2028separator")
    with (tmp_path / "log.jsonl").open("ab") as file:
        file.write('{"kind": "train", "step": 6, "name": "é'.encode()[:-1])
    assert [entry["step"] for entry in read_log(tmp_path / "log.jsonl")] == [1, 2, 3, 4, 5]
    with RunLog(tmp_path, False, "", {}, resume=True) as log:
        log.truncate_after(3)
        log.log("train", 4, loss=0.25)
    entries = read_log(tmp_path / "log.jsonl")
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4]
    assert entries[2]["loss"] == 1 / 3 and entries[2]["name"] == "line\u2028separator"
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_new_run_begins_a_new_log_and_a_resumed_one_without_a_log_does_too(tmp_path):
    for resume in (True, False, False):
        with RunLog(tmp_path, False, "", {}, resume=resume) as log:
            log.log("train", 1, loss=1.0)
        assert len(read_log(tmp_path / "log.jsonl")) == 1
    log.log("train", 2, loss=1.0)  # after closing: nothing
    log.close()
    assert len(read_log(tmp_path / "log.jsonl")) == 1


def test_other_processes_write_no_log(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with RunLog(tmp_path / "out", True, "project", {}) as log:
        log.log("train", 1, loss=1.0)
        log.truncate_after(0)
    assert not (tmp_path / "out").exists()


def test_wandb_offline_run_holds_the_metrics_below_the_output_folder(tmp_path, wandb_environment, capfd):
    with RunLog(tmp_path, True, "test-project", {"learning_rate": 2e-4, "tune": "lora"}) as log:
        log.log("train", 1, epoch=0.1, loss=0.5)
        log.log("validation", 1, epoch=0.1, accuracy=0.75, loss=math.nan)
    sys.modules[
        "wandb"
    ].teardown()  # the file is written by a process of wandb's, which is complete when that has ended
    (recorded,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    content = recorded.read_bytes()
    for name in (
        b"train/loss",
        b"validation/accuracy",
        b"validation/loss",
        b"epoch",
        b"test-project",
        b"learning_rate",
    ):
        assert name in content
    assert b"train/epoch" not in content
    assert [entry["kind"] for entry in read_log(tmp_path / "log.jsonl")] == ["train", "validation"]
    assert capfd.readouterr().out == ""


def test_missing_wandb_login_is_a_usage_error_before_anything_is_written(tmp_path, wandb_environment):
    wandb_environment.setenv("WANDB_MODE", "online")
    wandb_environment.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(UsageError, match=r"(?s)--use-wandb: .*wandb login.*WANDB_MODE=offline"):
        RunLog(tmp_path, True, "test-project", {})
    assert not (tmp_path / "log.jsonl").exists()


def test_a_wrong_wandb_mode_is_a_usage_error(tmp_path, wandb_environment):
    wandb_environment.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(UsageError, match="sometimes"):
        RunLog(tmp_path, True, "test-project", {})


class BrokenRun:
    offline, id = False, "abc123"

    def __init__(self):
        self.logged, self.exit_code = [], None

    def log(self, figures, step):
        self.logged.append((step, figures))
        if len(self.logged) == 2:
            raise ConnectionError("the network\nwent away")

    def finish(self, exit_code):
        self.exit_code = exit_code


def fake_wandb_init(monkeypatch, run, error_when_online=None):
    import wandb

    calls = []

    def init(**arguments):
        calls.append(arguments)
        if error_when_online is not None and arguments.get("mode") != "offline":
            raise error_when_online
        return run

    monkeypatch.setattr(wandb, "init", init)
    return calls


def test_a_wandb_error_during_the_run_is_noted_once_and_the_run_goes_on(tmp_path, wandb_environment, capsys):
    run = BrokenRun()
    fake_wandb_init(wandb_environment, run)
    with RunLog(tmp_path, True, "p", {}) as log:
        for step in range(1, 5):
            log.log("train", step, loss=1.0)
    assert len(run.logged) == 2
    assert capsys.readouterr().err == "Weights & Biases: the network went away. The run goes on without it.\n"
    assert [entry["step"] for entry in read_log(tmp_path / "log.jsonl") if entry["kind"] == "train"] == [1, 2, 3, 4]


def test_an_unreachable_server_means_an_offline_record_and_a_note(tmp_path, wandb_environment, capsys):
    import wandb

    calls = fake_wandb_init(wandb_environment, BrokenRun(), wandb.errors.CommError("no such host"))
    RunLog(tmp_path, True, "p", {}).close()
    assert [call.get("mode") for call in calls] == [None, "offline"]
    assert calls[0]["settings"].init_timeout <= 30, "an unreachable server is noticed in seconds"
    assert "no such host" in capsys.readouterr().err


def test_a_rejected_login_is_a_usage_error(tmp_path, wandb_environment):
    import wandb

    fake_wandb_init(wandb_environment, BrokenRun(), wandb.errors.AuthenticationError("user is not logged in"))
    with pytest.raises(UsageError, match="user is not logged in"):
        RunLog(tmp_path, True, "p", {})


def test_a_resumed_run_goes_on_with_its_wandb_run_and_a_failed_one_is_marked(tmp_path, wandb_environment):
    run = BrokenRun()
    calls = fake_wandb_init(wandb_environment, run)
    with pytest.raises(ZeroDivisionError), RunLog(tmp_path, True, "p", {}) as log:
        log.log("train", 1, loss=1.0)
        raise ZeroDivisionError
    assert run.exit_code == 1
    with RunLog(tmp_path, True, "p", {}, resume=True) as log:
        log.truncate_after(0)
    assert run.exit_code == 0
    assert [call["id"] for call in calls] == [None, "abc123"]
    with RunLog(tmp_path, True, "p", {}, resume=True):
        pass
    assert calls[-1]["id"] == "abc123", "truncating keeps the id"


def test_missing_wandb_package_is_a_usage_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match="pip install wandb"):
        RunLog(tmp_path, True, "p", {})


def test_replacing_leaves_the_old_file_when_the_writing_fails(tmp_path):
    path = tmp_path / "file.txt"
    with replacing(path) as beside:
        beside.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as beside:
        beside.write_text("half of the ne")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
