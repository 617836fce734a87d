"""Training on from a model that this program has trained: its prompts are used again, and `--epochs 0` is no test."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from commands import train
from tiny import save_classifier, tiny_classifier

from vlm.classifier import VLMClassifier
from vlm.common import UsageError
from vlm.config import METADATA, PROMPTS_OF_MODEL, resolve
from vlm.conversation import build_prompts
from vlm.inference import trained_with
from vlm.training.prompts import choose_prompts

TEXTS = {
    "task_description": "telling pets apart",
    "system_instructions": "Look at the fur. {classes}",
    "prompt_template": "Which of {classes}?\nAnswer: ...\nReasoning: ...",
    "question_first": True,
}
NAMES = ["cat", "dog", "hen"]


def metadata_of(prompts, settings):
    return {
        "class_names": list(prompts.class_names),
        "prompts": prompts.to_json(),
        "settings": settings.complete(batch_size=8, objective="both").to_json(),
        "model": "elsewhere",
    }


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """The folder of a model that was trained with texts and descriptions of its own, and its prompts."""
    folder = tmp_path_factory.mktemp("trained")
    descriptions = folder / "descriptions.json"
    descriptions.write_text(json.dumps({"cat": "whiskers and paws"}))
    settings = resolve(TEXTS | {"model": "x", "class_descriptions": str(descriptions)})
    prompts = build_prompts(settings, NAMES)
    classifier = VLMClassifier(tiny_classifier(tiny_model).family, prompts)
    save_classifier(folder / "best_model", classifier, metadata_of(prompts, settings), torch.float32)
    descriptions.unlink()
    return folder / "best_model", prompts


def choose(folder, names, **given):
    settings = resolve({"model": str(folder), "dataset": "pets"} | given)
    return choose_prompts(build_prompts(settings, names), settings, folder)


def test_of_the_same_classes_the_prompts_are_used_again_in_the_order_of_the_dataset(trained, capsys):
    folder, prompts = trained
    assert choose(folder, NAMES).prompts == prompts
    chosen = choose(folder, ["Hen", "CAT", "dog"])
    said = chosen.prompts
    assert chosen.kind == PROMPTS_OF_MODEL and (said.system, said.question) == (prompts.system, prompts.question)
    assert said.class_names == ("Hen", "CAT", "dog") and said.shown_names == ("hen", "cat", "dog")
    assert said.responses == (prompts.responses[2], *prompts.responses[:2]) and "whiskers" in said.responses[1]
    assert said.question_first and said.response_format == "answer-first"
    err = capsys.readouterr().err
    assert "its prompts are used again, and the dataset has its 3 classes" in err and "--prompts new" in err


def test_of_other_classes_the_texts_are_used_again_and_the_classes_are_those_of_the_dataset(trained, capsys):
    folder, _ = trained
    chosen = choose(folder, ["cat", "dog", "owl", "pig"])
    assert chosen.prompts == build_prompts(resolve(TEXTS), ["cat", "dog", "owl", "pig"])
    assert chosen.texts == resolve(TEXTS).texts, "a later run with other classes finds them again"
    assert "New classes: owl, pig. No longer there: hen. Descriptions" in capsys.readouterr().err


@pytest.mark.parametrize("given", [{"task_description": "birds"}, {"class_map": "map.json"}, {"prompts": "new"}])
def test_flags_about_prompts_build_new_ones(trained, given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "map.json").write_text('{"cat": "a cat"}')
    chosen = choose(trained[0], NAMES, **given)
    assert chosen.prompts == build_prompts(resolve(given), NAMES) and chosen.kind == "new"
    said = capsys.readouterr().err
    assert ("its prompts are not used, as" in said) == ("prompts" not in given)


def test_a_model_that_this_program_did_not_train_brings_none(tiny_model, trained, tmp_path, capsys):
    assert choose(tiny_model, NAMES).kind == "new" and capsys.readouterr().err == ""
    with pytest.raises(UsageError, match="has none, as this program did not train it"):
        choose(tiny_model, NAMES, prompts="model")
    broken = shutil.copytree(trained[0], tmp_path / "broken")
    metadata = json.loads((broken / METADATA).read_text())
    (broken / METADATA).write_text(json.dumps(metadata | {"prompts": {"system": 3}}))
    assert choose(broken, NAMES).kind == "new" and "are not used" in capsys.readouterr().err
    assert trained_with(tiny_model) is None


def test_what_does_not_go_together_is_refused(trained):
    with pytest.raises(UsageError, match="--prompts model takes the prompts"):
        resolve({"prompts": "model", "task_description": "birds"})
    folder, prompts = trained
    plain = replace(prompts, response_format="answer-only")
    metadata = json.loads((folder / METADATA).read_text())
    (folder / METADATA).write_text(json.dumps(metadata | {"prompts": plain.to_json()}))
    try:
        with pytest.raises(UsageError, match="are answer-only: add --prompts new"):
            choose(folder, NAMES, reasoning_column="why")
    finally:
        (folder / METADATA).write_text(json.dumps(metadata))


def test_no_epochs_point_to_the_test_of_the_model(trained, capsys):
    choose(trained[0], NAMES, epochs=0)
    err = capsys.readouterr().err
    assert "--epochs 0 trains nothing" in err and f"--model-dir {trained[0]} --dataset pets" in err


@pytest.mark.slow
def test_a_run_from_a_trained_model_keeps_its_prompts_when_it_is_resumed(tiny_model, color_folder, tmp_path, capsys):
    flags = ["--dataset", color_folder, "--epochs", 1, "--tune", "connector", "--device", "cpu", "--batch-size", 8]
    first, second = tmp_path / "first", tmp_path / "second"
    words = ["--system-instructions", "Colors: {classes}", "--response-format", "answer-only"]
    assert train("--model", tiny_model, *flags, *words, "--output-dir", first) == 0
    assert train("--model", first / "best_model", *flags, "--output-dir", second) == 0
    runs = [json.loads((folder / METADATA).read_text()) for folder in (first, second)]
    assert runs[1]["prompts"] == runs[0]["prompts"] and runs[1]["settings"]["prompts"] == PROMPTS_OF_MODEL
    assert runs[1]["settings"]["system_instructions"] is None and runs[1]["texts"] == runs[0]["texts"]
    (second / "results.json").unlink()  # as if it was stopped in the test
    assert train("--resume", "--output-dir", second) == 0
    assert json.loads((second / METADATA).read_text())["prompts"] == runs[0]["prompts"]
    assert "those that the model was trained with" in capsys.readouterr().err
