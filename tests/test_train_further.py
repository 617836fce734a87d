"""`--resume` of a finished run names a command that trains further; followed literally, it does."""

import json
import shlex
import shutil

import pytest
from commands import train

from vlm.config import METADATA, flags_to_train_further, parse_arguments, resolve

DATA = {"dataset": "images", "output_dir": "results"}


def finished(**given):
    return resolve(DATA | given).complete(batch_size=8, objective="both")


@pytest.mark.parametrize(
    ("given", "epochs", "expected"),
    [
        ({"epochs": 3}, 5, "--epochs 2"),
        ({"epochs": 3}, 2, "--epochs 2"),
        ({"epochs": 3}, None, "--epochs 3"),
        ({"class_names": ["a b", "c"]}, 4, "--epochs 1 --class-names 'a b' c"),
        ({"tune": "full", "learning_rate": 3e-5}, 4, "--epochs 1 --tune full --learning-rate 3e-05"),
        ({"prompt_template": "Answer: {classes}"}, 4, "--epochs 1 --prompt-template 'Answer: {classes}'"),
        ({"align_connector": True, "model_revision": "v1", "probe": True}, 4, "--epochs 1 --probe"),
    ],
)
def test_it_is_the_same_run_from_the_best_model_on(given, epochs, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = finished(**given)
    flags = flags_to_train_further(saved, tmp_path / "results", epochs)
    start = f"--output-dir {tmp_path}/results_2 "
    text = shlex.join(flags)
    assert text.startswith(start)
    for part in shlex.split(expected):
        assert part in flags
    assert ("--dataset images" in text) and (f"--model {tmp_path}/results/best_model" in text)
    assert "--align-connector" not in flags and "--model-revision" not in flags
    again = resolve(parse_arguments(flags))
    for name in ("class_names", "tune", "learning_rate", "response_format", "prompt_template", "probe", "seed"):
        assert getattr(again, name) == getattr(saved, name)


def test_an_output_folder_that_is_there_is_not_named(tmp_path):
    (tmp_path / "results_2").mkdir()
    assert f"{tmp_path}/results_3" in flags_to_train_further(finished(), tmp_path / "results", None)


def command_for(output, epochs, capsys):
    """The flags of the command that is printed."""
    capsys.readouterr()
    assert train("--resume", "--epochs", epochs, "--output-dir", output) == 2
    first, command = capsys.readouterr().err.splitlines()
    assert first.startswith(
        f"error: --resume: {output} holds a finished run, so there is nothing to continue. To train "
    )
    python, script, *flags = shlex.split(command)
    assert script.endswith("train_vlm.py")
    return flags


@pytest.mark.slow
def test_the_demo_is_trained_longer(demo_run, tmp_path, capsys):
    output = shutil.copytree(demo_run, tmp_path / "results")
    flags = command_for(output, 2, capsys)
    assert train(*flags) == 0
    settings = json.loads((tmp_path / "results_2" / METADATA).read_text())["settings"]
    before = json.loads((output / METADATA).read_text())["settings"]
    changed = {name for name in settings if settings[name] != before[name]}
    assert changed == {"epochs", "output_dir"} and settings["epochs"] == 2


@pytest.mark.slow
def test_a_model_is_trained_further(tiny_model, color_folder, tmp_path, capsys):
    output = tmp_path / "results"
    flags = ["--model", tiny_model, "--dataset", color_folder, "--epochs", 1, "--tune", "connector", "--device", "cpu"]
    assert train(*flags, "--output-dir", output) == 0
    assert train(*command_for(output, 2, capsys)) == 0
    after = json.loads((tmp_path / "results_2" / METADATA).read_text())
    assert after["model"] == str(output / "best_model") and after["settings"]["epochs"] == 1
    assert after["settings"]["tune"] == "connector" and after["settings"]["dataset"] == str(color_folder)
