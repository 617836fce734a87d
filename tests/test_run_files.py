"""Which files belong to a run: nothing else is deleted, and a crash at any moment loses no run."""

import json
import os
import shutil
from contextlib import suppress

import pytest
from commands import names_in
from test_output import everything, make_run

from vlm.common.errors import UsageError
from vlm.config import MANIFEST, METADATA
from vlm.training.run_files import begin, drop_previous, files_of_run, is_unsettled, list_tracked, settle


class Killed(BaseException):
    """Stands for SIGKILL: nothing cleans up after it."""


def killed_at(number, monkeypatch):
    """Let the program die at a change of the file system."""
    count = iter(range(10_000))

    def counted(change):
        def changed(*arguments, **options):
            if next(count) == number:
                raise Killed
            return change(*arguments, **options)

        return changed

    for module, name in (
        (os, "rename"),
        (os, "replace"),
        (os, "unlink"),
        (os, "mkdir"),
        (os, "rmdir"),
        (shutil, "rmtree"),
    ):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))


@pytest.mark.parametrize("has_manifest", [False, True])
def test_a_run_that_is_overwritten_is_whole_again_after_a_crash_at_any_moment(tmp_path, has_manifest, monkeypatch):
    """The new run dies at each step of setting the old one aside, and its successor at each step of putting it back."""
    outcomes = set()
    for number in range(60):
        folder = tmp_path / str(number)
        folder.mkdir()
        before = make_run(folder)
        if has_manifest:
            begin(folder, resume=True, overwrite=False)
            before = everything(folder)
        with monkeypatch.context() as patched:
            killed_at(number, patched)
            try:
                begin(folder, resume=False, overwrite=True)
                (folder / METADATA).write_text("new")
                (folder / "log.jsonl").write_text("new")
                settle(folder)
                end = "over"
            except Killed:
                end = "killed"
        outcomes.add(end)
        settle(folder)
        assert {name: text for name, text in everything(folder).items() if not name.endswith(".tmp")} == before
        assert not is_unsettled(folder)
    assert outcomes == {"over", "killed"}


def test_a_new_run_with_a_model_stays_the_one_after_a_crash_at_any_moment(tmp_path, monkeypatch):
    for number in range(12):
        folder = tmp_path / str(number)
        folder.mkdir()
        make_run(folder)
        begin(folder, resume=False, overwrite=True)
        (folder / METADATA).write_text("new")
        (folder / "best_model").mkdir()
        with monkeypatch.context() as patched:
            killed_at(number, patched)
            with suppress(Killed):
                drop_previous(folder)
        settle(folder)
        assert (folder / METADATA).read_text() == "new" and not is_unsettled(folder)


def test_what_trackers_wrote_during_the_run_is_the_runs_and_what_was_there_before_is_not(tmp_path):
    for name in ("wandb/run-theirs", "wandb/mine", "tensorboard"):
        (tmp_path / name).mkdir(parents=True)
    begin(tmp_path, resume=False, overwrite=False)
    (tmp_path / METADATA).write_text("{}")
    for name in ("wandb/run-1", "wandb/other", "tensorboard/1732.5"):
        (tmp_path / name).mkdir()
    (tmp_path / "tensorboard" / "events.out.tfevents.1").touch()
    list_tracked(tmp_path)
    (tmp_path / "wandb" / "run-later").mkdir()
    expected = [METADATA, "tensorboard/1732.5", "tensorboard/events.out.tfevents.1", "wandb/run-1"]
    assert files_of_run(tmp_path) == expected
    begin(tmp_path, resume=True, overwrite=False)
    assert files_of_run(tmp_path) == expected, "a resumed run keeps what is its own"
    begin(tmp_path, resume=False, overwrite=True)
    drop_previous(tmp_path)
    assert names_in(tmp_path / "wandb") == {"run-theirs", "mine", "other", "run-later"}


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "/etc/passwd",
        "notes.txt",
        "wandb",
        "wandb/../../outside",
        "wandb/mine.txt",
        "best_model/..",
        "",
        7,
    ],
)
def test_a_manifest_cannot_name_files_that_no_run_writes(tmp_path, name):
    output = tmp_path / "results"
    (output / "wandb").mkdir(parents=True)
    (output / "best_model").mkdir()
    for path in (tmp_path / "outside", output / "notes.txt", output / "wandb" / "mine.txt", output / METADATA):
        path.write_text("{}")
    (output / MANIFEST).write_text(json.dumps({"files": [name, METADATA], "not_ours": []}))
    assert files_of_run(output) == [METADATA]


def test_a_folder_of_a_tracker_that_is_a_link_is_left_alone(tmp_path):
    (tmp_path / "elsewhere" / "run-1").mkdir(parents=True)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "wandb").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "results" / METADATA).write_text("{}")
    assert files_of_run(tmp_path / "results") == [METADATA]


@pytest.mark.parametrize("text", ["{", "[]", '{"files": 1, "not_ours": []}'])
def test_a_damaged_manifest_is_named_with_the_cure(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(UsageError, match=f"{MANIFEST} .* Delete it: the files of the run are then those"):
        files_of_run(tmp_path)
