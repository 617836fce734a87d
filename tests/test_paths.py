"""Paths as users write them: a ~ at the beginning is the home folder, everywhere, and only there."""

from pathlib import Path

import pytest
from commands import names_in, run

from vlm.config import METADATA, read_settings, resolve

HERE = {"dataset": "x", "output_dir": "results"}


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return str(tmp_path / "home")


@pytest.mark.parametrize("name", ["model", "dataset", "class_descriptions", "output_dir"])
def test_a_path_is_expanded_where_settings_are_made(name, home):
    assert getattr(resolve(HERE | {name: "~/a/~/b"}), name) == f"{home}/a/~/b"
    assert getattr(resolve(HERE | {name: "a~/~b"}), name) == "a~/~b"


def test_files_with_a_function_or_a_text_in_them_are_expanded(home):
    assert resolve(HERE | {"metrics": ["~/m.py:f", "n.py:g"]}).metrics == [f"{home}/m.py:f", "n.py:g"]
    Path(home, "text.txt").write_text("Which one? {classes}")
    assert resolve(HERE | {"prompt_template": "@~/text.txt"}).prompt_template == "Which one? {classes}"


def test_a_run_of_a_version_that_saved_the_path_as_it_was_written_can_be_resumed(home):
    saved = read_settings({"dataset": "~/images", "model": "m", "metrics": ["~/m.py:f"], "batch_size": 1})
    given = {"resume": True, "dataset": "~/images", "metrics": ["~/m.py:f"], "output_dir": "~/results"}
    settings = resolve(given, saved)
    assert (settings.dataset, settings.output_dir) == (f"{home}/images", f"{home}/results")


def test_both_programs_look_in_the_same_folder(tmp_path, home, monkeypatch):
    """`--output-dir=~/x` reaches the program with its ~, because shells expand it only at the beginning of a word."""
    (tmp_path / "home" / "x").mkdir()
    (tmp_path / "home" / "x" / METADATA).write_text("{}")
    result = run("train_vlm.py", "--demo", "--output-dir=~/x", cwd=tmp_path, HOME=home)
    assert result.stderr.startswith(f"error: {home}/x holds an interrupted run")
    result = run("train_vlm.py", "--resume", "--output-dir=~/x", cwd=tmp_path, HOME=home)
    assert result.stderr.startswith(f"error: {home}/x/{METADATA} is damaged: ")
    result = run("inference_vlm.py", "--model-dir=~/x", "~/x", "--output=~/nowhere/x.csv", cwd=tmp_path, HOME=home)
    assert result.stderr.startswith(f"error: --output {home}/nowhere/x.csv cannot be written")
    result = run("inference_vlm.py", "--model-dir=~/y", "~/x", cwd=tmp_path, HOME=home)
    assert result.stderr.startswith(f"error: {home}/x has no image")
    assert names_in(tmp_path) == {"home"}
