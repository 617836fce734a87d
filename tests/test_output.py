"""The output folder: no run is lost in it, and a run that never began leaves nothing."""

import json
import subprocess
import sys

import pytest
from commands import ROOT, names_in, train

from vlm.common.errors import UsageError
from vlm.config import METADATA, RESULTS, resolve
from vlm.training.output import check_output, output_folder


def settings(output, **more):
    return resolve({"demo": True, "output_dir": str(output)} | more)


def test_a_run_that_is_there_is_refused_before_torch_is_imported(tmp_path):
    (tmp_path / RESULTS).write_text("{}")
    flags = ["--demo", "--output-dir", str(tmp_path)]
    program = f"import sys, train_vlm; print(train_vlm.main({flags}), 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "2 False\n" and result.stderr.startswith(f"error: {tmp_path} holds a finished run")


@pytest.mark.parametrize(("name", "said"), [(RESULTS, "holds a finished run"), (METADATA, "holds an interrupted run")])
def test_nothing_is_lost_in_it(tmp_path, name, said):
    (tmp_path / name).write_text("{}")
    for check in (check_output, lambda given: output_folder(given).__enter__()):
        with pytest.raises(UsageError, match=said):
            check(settings(tmp_path))
    assert names_in(tmp_path) == {name}
    (tmp_path / "tensorboard").mkdir()
    with output_folder(settings(tmp_path, overwrite=True)):
        assert names_in(tmp_path) == set()


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
    with pytest.raises(error), output_folder(settings(tmp_path / "new" / "results")):
        (tmp_path / "new" / "results" / "demo_model").mkdir()
        raise error
    assert names_in(tmp_path) == set()
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "best_model").mkdir()
    with pytest.raises(error), output_folder(settings(tmp_path / "own")):
        raise error
    assert names_in(tmp_path / "own") == {"best_model"}, "it was there before"
    with pytest.raises(error), output_folder(settings(tmp_path / "other")):
        (tmp_path / "other" / "notes.txt").touch()
        raise error
    assert names_in(tmp_path / "other") == {"notes.txt"}, "that of somebody else stays"


def test_a_run_that_has_begun_is_left_to_be_resumed(tmp_path):
    with pytest.raises(UsageError), output_folder(settings(tmp_path / "new")):
        (tmp_path / "new" / METADATA).write_text("{}")
        raise UsageError
    assert names_in(tmp_path / "new") == {METADATA}


def test_other_processes_make_and_delete_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with output_folder(settings(tmp_path / "new")):
        assert not (tmp_path / "new").exists()
    (tmp_path / RESULTS).write_text("{}")
    with output_folder(settings(tmp_path, overwrite=True)):
        assert names_in(tmp_path) == {RESULTS}


@pytest.mark.slow
def test_a_login_that_fails_is_no_interrupted_run(tmp_path, monkeypatch, capsys):
    flags = ["--demo", "--max-samples", 10, "--epochs", 1, "--device", "cpu", "--use-wandb", "--output-dir"]
    (tmp_path / "there").mkdir()

    def fail(*arguments, **options):
        raise UsageError("--use-wandb: user is not logged in")

    monkeypatch.setattr("vlm.training.run_log.start_tracker", fail)
    for name in ("there", "new"):
        assert train(*flags, tmp_path / name) == 2
        assert "user is not logged in" in capsys.readouterr().err
        check_output(settings(tmp_path / name))
    assert names_in(tmp_path) == {"there"}
    monkeypatch.undo()
    flags.remove("--use-wandb")
    assert train(*flags, tmp_path / "there") == 0
    assert json.loads((tmp_path / "there" / RESULTS).read_text())
