"""What a run must not lose or take for its own: a run without metadata, files of others, the model of another run."""

import json
import os
import shutil

import pytest
from commands import classify, names_in, train
from tiny import random_image

from vlm.common import UsageError, files_of_others, write_folder
from vlm.config import BEST_MODEL, METADATA, RESULTS, STATE, resolve
from vlm.data import load_data
from vlm.training.loop import Trainer
from vlm.training.output import check_output, check_resumable, clean_up
from vlm.training.run_files import begin, claim_results

FLAGS = ("--demo", "--max-samples", 20, "--epochs", 1, "--device", "cpu")


@pytest.fixture
def run(demo_run, tmp_path):
    """A copy of a finished run."""
    return shutil.copytree(demo_run, tmp_path / "out")


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("as_folder", [False, True])
def test_a_run_whose_metadata_are_gone_is_still_a_run(run, finished, as_folder):
    (run / METADATA).unlink()
    if as_folder:
        (run / METADATA).mkdir()
    if not finished:
        (run / RESULTS).unlink()
    before = names_in(run)
    clean_up(run)
    with pytest.raises(UsageError, match="holds (a finished|an interrupted) run|holds a run, but its"):
        check_output(resolve({"demo": True, "output_dir": str(run)}))
    assert names_in(run) == before


def test_resuming_a_run_without_metadata_names_the_copy(run):
    (run / METADATA).unlink()
    copy = run / BEST_MODEL / METADATA
    with pytest.raises(UsageError) as error:
        check_resumable(run)
    assert str(error.value) == (
        f"--resume: {run} holds a run, but its {METADATA} is missing. Copy {copy} there, then continue with --resume, "
        "or delete the run with --overwrite."
    )


@pytest.mark.parametrize("name", ["best_model/notes.txt", "demo_images/notes.txt", "final_model/more"])
@pytest.mark.parametrize("flag", ["overwrite", "resume"])
def test_files_of_others_in_the_folders_of_a_run_are_named_before_they_would_be_lost(run, name, flag):
    (run / RESULTS).unlink()
    (run / name).write_text("mine")
    (run / BEST_MODEL / ".hidden").touch()
    with pytest.raises(UsageError, match=f"holds {name}, which no run of this program has written"):
        check_output(resolve({"demo": True, "output_dir": str(run), flag: True}))
    (run / name).unlink()
    check_output(resolve({"demo": True, "output_dir": str(run), flag: True}))


def test_a_file_of_others_stays_in_a_folder_that_is_replaced(tmp_path):
    folder = tmp_path / "model"
    for content in ("one", "two"):
        write_folder(folder, lambda new, content=content: (new / "weights").write_text(content))
        (folder / "notes.txt").write_text("mine")
    write_folder(folder, lambda new: (new / "weights").write_text("three"))
    assert (folder / "weights").read_text() == "three" and (folder / "notes.txt").read_text() == "mine"


def test_a_report_that_somebody_else_writes_during_a_run_is_kept(tmp_path, capsys):
    begin(tmp_path, resume=False, overwrite=False)
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(UsageError, match="holds report.html, which"):
        check_output(resolve({"demo": True, "output_dir": str(tmp_path)}))
    claim_results(tmp_path)
    assert (
        tmp_path / "report.html.1"
    ).read_text() == "mine" and "is called report.html.1 now" in capsys.readouterr().err
    (tmp_path / "report.html").write_text("of the run")
    claim_results(tmp_path)
    assert (tmp_path / "report.html").read_text() == "of the run", "from now on it belongs to the run"


@pytest.mark.slow
def test_the_best_model_of_another_run_is_not_tested_as_that_of_this_one(demo_run, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    final_model = Trainer.train

    def exchanged(self):
        final_model(self)
        shutil.rmtree(output / BEST_MODEL)
        shutil.copytree(demo_run / BEST_MODEL, output / BEST_MODEL)

    monkeypatch.setattr(Trainer, "train", exchanged)
    assert train(*FLAGS, "--output-dir", output) == 1
    assert f"{output / BEST_MODEL} is the model of another run" in capsys.readouterr().err
    assert not (output / RESULTS).exists() and (output / STATE).is_dir()


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_a_lock_that_is_no_file_is_said_and_not_waited_for(tmp_path, capsys, kind):
    (os.mkfifo if kind == "pipe" else os.mkdir)(tmp_path / ".run.lock")
    assert train(*FLAGS, "--output-dir", tmp_path) == 2
    assert capsys.readouterr().err.endswith(".run.lock is not a file: delete it, or choose another --output-dir.\n")


@pytest.mark.parametrize("name", ["table.csv", "log.jsonl"])
def test_predictions_replace_predictions_only(demo_run, tmp_path, capsys, name):
    output = tmp_path / name
    images = ["--model-dir", demo_run / BEST_MODEL, demo_run / "demo_images", "--output", output]
    output.write_text("file,label\n")
    assert classify(*images) == 2
    assert "exists and holds no predictions" in capsys.readouterr().err and output.read_text() == "file,label\n"
    output.write_text("")
    assert classify(*images) == classify(*images) == 0
    assert output.read_text().startswith(("path,prediction", '{"path": '))


def test_predictions_are_not_written_into_the_model_folder(demo_run, capsys):
    folder = demo_run / BEST_MODEL
    assert classify("--model-dir", folder, demo_run / "demo_images", "--output", folder / "p.csv") == 2
    assert "is in the folder of the model" in capsys.readouterr().err and not (folder / "p.csv").exists()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("image_seq_len", 10**9, "image_seq_len: 1000000000, expected 1 to 10,000"),
        ("image_seq_len", -1, "image_seq_len: -1, expected 1 to 10,000"),
        ("image_seq_len", 5, "image tokens, and the vision encoder gives"),
    ],
)
def test_a_processor_that_does_not_fit_its_model_is_said_before_memory_is_taken(run, capsys, name, value, said):
    folder = run / BEST_MODEL
    (folder / "checksums.json").unlink()
    settings = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps(settings | {name: value}))
    assert classify("--model-dir", folder, run / "demo_images") in (1, 2)
    err = capsys.readouterr().err
    assert said in err and "mistake of the program" not in err


def test_a_split_that_lacks_classes_is_said(tmp_path, capsys):
    for split, classes in {"train": "abc", "val": "abc", "test": "a"}.items():
        for name in classes:
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(3):
                random_image(100 * ord(name) + 10 * len(split) + i).save(tmp_path / split / name / f"{i}.png")
    load_data(resolve({"dataset": str(tmp_path)}))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert said == ["warning: test has no image of b, c, so its accuracy says nothing about them."]


@pytest.mark.parametrize("responses", [[], "x"])
def test_metadata_without_a_response_for_each_class_are_damaged(run, capsys, responses):
    folder = run / BEST_MODEL
    (folder / "checksums.json").unlink()
    metadata = json.loads((folder / METADATA).read_text())
    metadata["prompts"]["responses"] = responses
    (folder / METADATA).write_text(json.dumps(metadata))
    assert classify("--model-dir", folder, run / "demo_images") == 2
    assert "its classes and prompts cannot be read" in capsys.readouterr().err


def test_a_bit_that_flipped_in_a_name_makes_no_file_one_of_somebody_else(tmp_path):
    write_folder(tmp_path / "model", lambda new: [(new / name).write_text(name) for name in ("a.txt", "b.txt")])
    (tmp_path / "model" / "of_mine.txt").write_text("mine")
    assert files_of_others(tmp_path / "model") == ["of_mine.txt"]
    sums = tmp_path / "model" / "checksums.json"
    sums.write_text(sums.read_text().replace("a.txt", "c.txt"))
    assert files_of_others(tmp_path / "model") == []
