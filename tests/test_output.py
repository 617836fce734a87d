"""The output folder: no run is lost in it, and a run that never began leaves nothing."""

import json
import shutil
import subprocess
import sys

import pytest
from commands import ROOT, names_in, train

from vlm.common.errors import Stopped, UsageError
from vlm.config import MANIFEST, METADATA, PREVIOUS_RUN, RESULTS, STATE, resolve
from vlm.training.output import check_output, clean_up, output_folder
from vlm.training.run_files import NEW_DEMO_MODEL, begin, drop_previous

# All that is there when a run has begun that overwrites another one, besides files that are not the program's.
MEANWHILE = {".run_files.json", ".run.lock", ".previous_run", "demo_model", "notes.txt"}


def settings(output, **more):
    return resolve({"demo": True, "output_dir": str(output)} | more)


def make_run(folder, finished=True):
    """A run of a version without manifests."""
    for name in ("best_model", "resume_state.old", "demo_model", "wandb/run-1", "wandb/own"):
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").write_text("old")
    for name in (METADATA, "wandb/mine.txt", "notes.txt", *([RESULTS] if finished else [])):
        (folder / name).write_text("{}")
    return everything(folder)


def everything(folder):
    """All files by their paths, with their content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_that_is_there_is_refused_before_torch_is_imported(tmp_path):
    make_run(tmp_path)
    flags = ["--demo", "--output-dir", str(tmp_path)]
    program = f"import sys, train_vlm; print(train_vlm.main({flags}), 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "2 False\n" and result.stderr.startswith(f"error: {tmp_path} holds a finished run")


@pytest.mark.parametrize(("finished", "said"), [(True, "holds a finished run"), (False, "holds an interrupted run")])
def test_nothing_is_lost_in_it(tmp_path, finished, said):
    before = make_run(tmp_path, finished)
    for check in (check_output, lambda given: output_folder(given).__enter__()):
        with pytest.raises(UsageError, match=said):
            check(settings(tmp_path))
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ["report.html", RESULTS, "log.jsonl", "best_model"])
def test_files_that_no_run_has_written_are_neither_overwritten_nor_deleted(tmp_path, name):
    (tmp_path / name).mkdir() if name == "best_model" else (tmp_path / name).touch()
    for given in (settings(tmp_path), settings(tmp_path, overwrite=True)):
        with pytest.raises(UsageError, match=f"holds {name}, which no run of this program has written .* move what"):
            check_output(given)
    assert names_in(tmp_path) == {name}


@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_output_folder_is_refused(empty, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="--output-dir is empty: expected a folder"):
        settings(empty)


def test_folders_that_hold_everything_else_are_refused(tmp_path, monkeypatch):
    (tmp_path / "project" / "here").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "project"))
    monkeypatch.chdir(tmp_path / "project" / "here")
    for output, said in {"/": "above the current one", "..": "your home folder", "../..": "above", "~": "home"}.items():
        with pytest.raises(UsageError, match=f"--output-dir .* is .*{said}.*: choose a folder only for the results"):
            check_output(settings(output, overwrite=True))
    check_output(settings("."))
    check_output(settings("../results"))


def test_a_run_does_not_overwrite_what_it_starts_from(tmp_path):
    make_run(tmp_path)
    for flag, given in {"--model": {"dataset": "x"}, "--image-folder": {"dataset": "x.csv"}}.items():
        given |= {flag[2:].replace("-", "_"): f"{tmp_path}/best_model"}
        with pytest.raises(UsageError, match=rf"{flag} .*/best_model is part of the run that --overwrite deletes"):
            check_output(settings(tmp_path, overwrite=True, demo=False, **given))


@pytest.mark.parametrize("output", ["images", "images/results", "images/cat/../new"])
def test_results_are_not_put_where_they_would_be_taken_for_a_class(tmp_path, monkeypatch, output):
    (tmp_path / "images" / "cat").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UsageError, match=f"--output-dir {output} is in the folder of --dataset images: .* Choose a folder next to it."
    ):
        check_output(resolve({"dataset": "images", "output_dir": output, "overwrite": True}))
    check_output(resolve({"dataset": "images", "output_dir": "images_results"}))
    check_output(resolve({"dataset": "images/table.csv", "output_dir": output}))


@pytest.mark.parametrize("error", [UsageError, KeyboardInterrupt])
def test_a_run_that_did_not_begin_leaves_nothing_of_its_own(tmp_path, error):
    for name in ("new/results", "there", "other"):
        output = tmp_path / name
        if name == "there":
            output.mkdir()
        with pytest.raises(error), output_folder(settings(output)):
            (output / NEW_DEMO_MODEL).mkdir()
            begin(output, resume=False, overwrite=False)
            (output / "log.jsonl").touch()
            if name == "other":
                (output / "notes.txt").touch()
            raise error
    assert names_in(tmp_path) == {"there", "other"}
    assert names_in(tmp_path / "there") == set()
    assert names_in(tmp_path / "other") == {"notes.txt"}, "that of somebody else stays"


def test_a_run_that_has_begun_is_left_to_be_resumed(tmp_path):
    output = tmp_path / "new"
    with pytest.raises(UsageError), output_folder(settings(output)):
        begin(output, resume=False, overwrite=False)
        (output / METADATA).write_text("{}")
        raise UsageError
    assert names_in(output) == {METADATA, MANIFEST}


@pytest.mark.parametrize("kept", ["nothing begun", "begun", "metadata"])
@pytest.mark.parametrize("error", [UsageError, KeyboardInterrupt])
def test_a_run_that_is_overwritten_is_back_if_the_new_one_ends_before_it_has_a_model(tmp_path, error, kept, capsys):
    before = make_run(tmp_path)
    with pytest.raises(error), output_folder(settings(tmp_path, overwrite=True)):
        assert everything(tmp_path).items() >= before.items(), "untouched until the new run begins"
        (tmp_path / NEW_DEMO_MODEL).mkdir()
        if kept != "nothing begun":
            begin(tmp_path, resume=False, overwrite=True)
            assert names_in(tmp_path) == {*MEANWHILE, "wandb"} and names_in(tmp_path / "wandb") == {"mine.txt", "own"}
            (tmp_path / "wandb" / "run-2").mkdir()
        if kept == "metadata":
            (tmp_path / METADATA).write_text("new")
        raise error
    assert everything(tmp_path) == before
    said = f"The earlier run in {tmp_path} is back: the one that was to overwrite it ended before it had a model."
    assert (said in capsys.readouterr().err) == (kept != "nothing begun")


def test_it_is_deleted_when_the_new_run_has_a_model_but_nothing_else_is(tmp_path):
    make_run(tmp_path)
    with output_folder(settings(tmp_path, overwrite=True)):
        begin(tmp_path, resume=False, overwrite=True)
        (tmp_path / METADATA).write_text("new")
        (tmp_path / "best_model").mkdir()
        drop_previous(tmp_path)
    assert everything(tmp_path).keys() == {
        METADATA,
        MANIFEST,
        "notes.txt",
        "wandb/mine.txt",
        "wandb/own/model.safetensors",
    }


def test_a_new_run_that_can_be_resumed_and_the_earlier_one_are_both_kept(tmp_path, capsys):
    make_run(tmp_path)
    with pytest.raises(Stopped), output_folder(settings(tmp_path, overwrite=True)):
        begin(tmp_path, resume=False, overwrite=True)
        (tmp_path / METADATA).write_text("new")
        (tmp_path / STATE).mkdir()
        raise Stopped
    assert (
        f"The earlier run is kept in {tmp_path / PREVIOUS_RUN} until the new one has a model."
        in capsys.readouterr().err
    )
    check_output(settings(tmp_path, resume=True))
    clean_up(tmp_path)
    assert (tmp_path / METADATA).read_text() == "new"
    with pytest.raises(KeyboardInterrupt), output_folder(settings(tmp_path, overwrite=True)):
        begin(tmp_path, resume=False, overwrite=True)
        raise KeyboardInterrupt
    assert (tmp_path / METADATA).read_text() == "{}", "of the two, the one with a model is kept"


def test_other_processes_make_and_delete_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with output_folder(settings(tmp_path / "new")):
        assert not (tmp_path / "new").exists()
    before = make_run(tmp_path)
    with output_folder(settings(tmp_path, overwrite=True)):
        assert everything(tmp_path) == before


@pytest.mark.slow
def test_a_login_that_fails_is_no_interrupted_run(tmp_path, monkeypatch, capsys):
    flags = ["--demo", "--max-samples", 10, "--epochs", 1, "--device", "cpu", "--use-wandb", "--output-dir"]
    (tmp_path / "there").mkdir()

    def fail(*arguments, **options):
        raise UsageError("--use-wandb: user is not logged in")

    monkeypatch.setattr("vlm.training.tracking.start_tracker", fail)
    for name in ("there", "new"):
        assert train(*flags, tmp_path / name) == 2
        assert "user is not logged in" in capsys.readouterr().err
        check_output(settings(tmp_path / name))
    assert names_in(tmp_path) == {"there"}
    monkeypatch.undo()
    flags.remove("--use-wandb")
    assert train(*flags, tmp_path / "there") == 0
    assert json.loads((tmp_path / "there" / RESULTS).read_text())


@pytest.mark.slow
def test_a_finished_run_survives_whatever_goes_wrong_in_the_one_that_overwrites_it(
    demo_run, tmp_path, monkeypatch, capsys
):
    output = shutil.copytree(demo_run, tmp_path / "results")
    before = everything(output)
    again = ["--demo", "--max-samples", 20, "--epochs", 1, "--batch-size", 4, "--overwrite", "--output-dir", output]
    assert train("--dataset", tmp_path / "misspelled", "--model", demo_run / "demo_model", *again[-3:]) == 2
    assert everything(output) == before
    for place in ("vlm.training.setup.preflight", "vlm.training.loop.Trainer.run_step"):
        for error in (MemoryError, KeyboardInterrupt):
            with monkeypatch.context() as patched:
                patched.setattr(place, raising(error))
                assert train(*again) in (1, 130)
            assert everything(output) == before
    assert "is back" in capsys.readouterr().err
    assert train(*again) == 0
    after = everything(output)
    head = {"best_model/evidence/head.safetensors"}  # only if its evidence counts
    assert after.keys() - head == before.keys() - head
    assert after["best_model/model.safetensors"] != before["best_model/model.safetensors"]


def raising(error):
    def fail(*arguments, **options):
        raise error

    return fail
