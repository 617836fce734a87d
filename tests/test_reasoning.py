"""Scores, texts and training where the images have reasonings of their own; and runs without training or with a test
before it."""

import csv
import json
from dataclasses import replace

import pytest
import torch
from commands import train
from PIL import Image
from safetensors.torch import load_file
from tiny import NAMES, full_row_logits, random_image, samples, save_tiny_model

from inference_vlm import load_model_and_metadata, predict_batch, predict_single_image
from vlm.classifier.batching import IGNORED, vlm_collate_fn
from vlm.classifier.classifier import VLMClassifier
from vlm.classifier.reasoning import classify, explain, names_class, write_freely
from vlm.common.errors import UsageError
from vlm.config import LAYOUTS, reasoning_of, resolve
from vlm.conversation.prompts import build_prompts, parse_answer
from vlm.conversation.responses import before_reasoning, response_lengths
from vlm.data import Rows, Split
from vlm.evaluation.evaluate import evaluate_vlm_model, score_split
from vlm.families import load_family
from vlm.training.setup import set_up

FREE = ("reasoning-first", "answer-first")
TEXTS = ["Bright, with a dark edge.", None, "Round (50%).\nNo edge.", "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def classifier_of(folder, response_format, reasoning_tokens=0):
    prompts = replace(
        build_prompts(resolve({"response_format": response_format}), NAMES), reasoning_tokens=reasoning_tokens
    )
    return VLMClassifier(load_family(folder, torch.float32, torch.device("cpu")), prompts).eval()


def batch_of(classifier, count=3):
    return classifier.collate(with_response=False)(samples([0] * count))


def forbid_writing(classifier, monkeypatch):
    def write(*arguments):
        raise AssertionError("a text was written")

    monkeypatch.setattr(classifier, "write", write)


# Scores and texts


@pytest.mark.parametrize("response_format", LAYOUTS)
def test_responses_of_the_classes_are_scored_whole_and_explained_without_writing(folder, response_format, monkeypatch):
    classifier = classifier_of(folder, response_format)
    forbid_writing(classifier, monkeypatch)
    batch = batch_of(classifier)
    found = classify(classifier, batch)
    torch.testing.assert_close(
        found.scores, classifier.score(classifier.read(batch)), rtol=1e-5, atol=0
    )  # in passes of other sizes
    assert classifier.rendered.scored_ids == classifier.rendered.response_ids
    assert explain(classifier, found, [2, 0, 6]) == [classifier.prompts.responses[c] for c in (2, 0, 6)]


def test_answers_that_come_first_are_scored_without_writing(folder, monkeypatch):
    classifier = classifier_of(folder, "answer-first", reasoning_tokens=12)
    forbid_writing(classifier, monkeypatch)
    assert classify(classifier, batch_of(classifier)).texts is None


def test_the_reasoning_behind_a_forced_answer_is_the_greedy_one_of_transformers(folder):
    classifier = classifier_of(folder, "answer-first", reasoning_tokens=12)
    batch = batch_of(classifier)
    for i, text in enumerate(explain(classifier, classify(classifier, batch), [1, 5, 3])):
        label = (1, 5, 3)[i]
        row = batch.input_ids[i, : batch.lengths[i]].tolist() + before_reasoning(
            classifier.family, classifier.rendered, label
        )
        start = len(row)
        for _ in range(12):
            with torch.no_grad():
                logits = full_row_logits(
                    classifier, row, {name: tensor[i : i + 1] for name, tensor in batch.pixels.items()}
                )
            row.append(int(logits[-1].argmax()))
            if row[-1] in classifier.family.stop_ids:
                break
        assert text == f"Answer: {NAMES[label]}\nReasoning: {reasoning_of(classifier.family.decode(row[start:]))}"


def test_the_explanation_has_the_reasoning_that_was_written_before_scoring(folder):
    classifier = classifier_of(folder, "reasoning-first", reasoning_tokens=12)
    batch = batch_of(classifier)
    found = classify(classifier, batch)
    assert found.texts == write_freely(classifier, classifier.read(batch)) and len(set(found.texts)) > 1
    texts = explain(classifier, found, [4, 4, 4])
    assert texts == [f"Reasoning: {reasoning_of(text)}\nAnswer: x" for text in found.texts]


@pytest.mark.parametrize("response_format", FREE)
def test_one_by_one_equals_a_batch(folder, response_format):
    classifier = classifier_of(folder, response_format, reasoning_tokens=12)
    images = samples([0, 0, 0])
    batch = classifier.collate(with_response=False)(images)
    together = classify(classifier, batch)
    texts = explain(classifier, together, [0, 1, 2])
    for i, sample in enumerate(images):
        batch = classifier.collate(with_response=False)([sample])
        alone = classify(classifier, batch)
        torch.testing.assert_close(alone.scores[0], together.scores[i], rtol=1e-6, atol=1e-5)
        assert explain(classifier, alone, [i]) == [texts[i]]


@pytest.mark.parametrize("response_format", FREE)
def test_images_that_are_read_twice_go_through_the_encoder_once(folder, response_format):
    classifier = classifier_of(folder, response_format, reasoning_tokens=12)
    passes = []
    classifier.family.vision.register_forward_hook(lambda *_: passes.append(1))
    explain(classifier, classify(classifier, batch_of(classifier)), [0, 1, 2])
    assert len(passes) == 1


@pytest.mark.parametrize(
    ("text", "name", "named"),
    [
        ("a Cat.", "cat", True),
        ("catfish", "cat", False),
        ("it is C++!", "C++", True),
        ("a cat fish", "cat fish", True),
        ("tomcat", "cat", False),
        ("", "cat", False),
    ],
)
def test_a_class_is_named_by_whole_words(text, name, named):
    assert names_class(text, name) is named


# Training on the texts


def split_of(texts):
    images = [random_image(i) for i in range(len(texts))]
    return Split(
        Rows(images, list(texts), [f"image {i}" for i in range(len(texts))], list(texts)),
        range(len(texts)),
        [0, 1, 2, 3],
    )


@pytest.mark.parametrize("response_format", FREE)
def test_a_sample_is_trained_on_its_own_text_or_on_that_of_its_class(folder, response_format):
    classifier = classifier_of(folder, response_format, reasoning_tokens=12)
    split = split_of(TEXTS)
    batch = classifier.collate(with_response=True)([split[i] for i in range(4)])
    responses = [row[row != IGNORED].tolist() for row in batch.targets]
    assert [classifier.family.decode(ids) for ids in responses] == [
        classifier.prompts.response(i, TEXTS[i]) for i in range(4)
    ]
    assert responses[1] == classifier.rendered.response_ids[1]
    assert response_lengths(split, classifier.family, classifier.rendered) == list(map(len, responses))


def test_texts_that_break_the_conversation_or_the_context_are_refused_by_name(folder):
    classifier = classifier_of(folder, "reasoning-first", reasoning_tokens=12)
    with pytest.raises(UsageError, match="reasoning of image 2 contains <image>"):
        response_lengths(split_of(["a", "b", "see <image>", "d"]), classifier.family, classifier.rendered)
    long = replace(samples([0])[0], reasoning="word " * 3000, name="long one")
    with pytest.raises(UsageError, match="long one has .* tokens .* its reasoning"):
        vlm_collate_fn([long], classifier.family, classifier.rendered)


SHADES = {"dark": 40, "light": 210}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Images of two shades in a CSV file with a text for most of them."""
    folder = tmp_path_factory.mktemp("table")
    with (folder / "shades.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "label", "why"])
        for i in range(40):
            name = list(SHADES)[i % 2]
            Image.new("L", (16, 16), SHADES[name] + i).save(folder / f"{i}.png")
            writer.writerow([f"{i}.png", name, "" if i in (3, 7, 8) else f"Number {i % 4}, {('low', 'high')[i % 2]}."])
    return folder / "shades.csv"


@pytest.mark.slow
@pytest.mark.parametrize("response_format", FREE)
def test_training_on_a_column_of_texts(folder, table, tmp_path, capsys, response_format):
    flags = [
        "--model",
        folder,
        "--dataset",
        table,
        "--reasoning-column",
        "why",
        "--response-format",
        response_format,
        "--tune",
        "full",
    ]
    more = [
        "--epochs",
        2,
        "--batch-size",
        4,
        "--learning-rate",
        3e-3,
        "--output-dir",
        tmp_path / "run",
        "--workers",
        1,
        "--zero-shot",
    ]
    assert train(*flags, *more) == 0
    printed = capsys.readouterr()
    assert "response format" in printed.err and response_format in printed.err
    assert "training images have a text" in printed.err and "which get the response of their class" in printed.err
    metadata = json.loads((tmp_path / "run" / "training_metadata.json").read_text())
    assert metadata["prompts"]["response_format"] == response_format and metadata["prompts"]["reasoning_tokens"] > 5
    assert metadata["dataset"]["reasoning_column"] == "why"
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["texts"]["texts"] > 0
    assert set(results["zero_shot"]) == {"accuracy", "nll", "macro_f1"}

    model, processor, metadata = load_model_and_metadata(tmp_path / "run" / "best_model", device="cpu")
    paths = [table.parent / f"{i}.png" for i in range(6)]
    found = predict_batch(model, processor, paths, metadata, show_progress=False)
    silent = predict_batch(model, processor, paths, metadata, explain=False, show_progress=False)
    for path, result in found.items():
        assert parse_answer(result["full_response"], model.class_names, response_format) == result["prediction"]
        assert result["full_response"].startswith("Reasoning: " if response_format == "reasoning-first" else "Answer: ")
        assert silent[path] == result | {"full_response": ""}
        prediction, confidence, text = predict_single_image(model, processor, path, metadata)
        assert (prediction, text) == (result["prediction"], result["full_response"])
        assert confidence == pytest.approx(result["confidence"], abs=1e-5)


def test_the_loss_of_a_step_is_the_mean_over_the_tokens_of_its_own_texts(folder, table, tmp_path):
    from vlm.training.loop import Trainer

    flags = {
        "model": str(folder),
        "dataset": str(table),
        "reasoning_column": "why",
        "tune": "full",
        "output_dir": str(tmp_path),
    }
    run = set_up(resolve(flags | {"batch_size": 2, "gradient_accumulation_steps": 4, "objective": "both"}))
    trainer = Trainer(run, lambda: False)
    plan = trainer.plan(0)[:1]
    with torch.no_grad():
        whole = run.classifier(run.classifier.collate(with_response=True)([run.data.train[i] for i in plan[0].indices]))
    assert len({trainer.response_lengths[i] for i in plan[0].indices}) > 1
    expected = torch.stack([whole.loss / whole.tokens, whole.posterior / len(plan[0].indices)])
    torch.testing.assert_close(trainer.run_step(plan[0], trainer.batches(plan)), expected, rtol=1e-5, atol=0)


# Without training, and before it


@pytest.mark.slow
def test_a_run_without_epochs_tests_the_untouched_model(folder, table, tmp_path, capsys):
    output = tmp_path / "run"
    assert train("--model", folder, "--dataset", table, "--epochs", 0, "--zero-shot", "--output-dir", output) == 0
    assert "none (--epochs 0)" in capsys.readouterr().out
    results = json.loads((output / "results.json").read_text())
    assert {name: results["test"][name] for name in results["zero_shot"]} == pytest.approx(
        results["zero_shot"], abs=1e-4
    )
    assert [entry["kind"] for entry in results["history"]] == ["validation"]
    before, after = load_file(folder / "model.safetensors"), load_file(output / "best_model" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert {"final_model", "training_curves.png", "confusion_matrix.png"} <= {path.name for path in output.iterdir()}


@pytest.mark.slow
def test_the_test_before_training_is_that_of_the_untouched_model(folder, table, tmp_path, capsys):
    flags = {"model": str(folder), "dataset": str(table), "output_dir": str(tmp_path / "none")}
    run = set_up(resolve(flags))
    expected = evaluate_vlm_model(run.classifier, run.data.test)
    output = tmp_path / "run"
    assert train("--model", folder, "--dataset", table, "--epochs", 1, "--zero-shot", "--output-dir", output) == 0
    printed = capsys.readouterr()
    results = json.loads((output / "results.json").read_text())
    assert results["zero_shot"] == pytest.approx({name: expected[name] for name in results["zero_shot"]}, abs=1e-5)
    assert results["test"]["nll"] != pytest.approx(expected["nll"], abs=1e-3), "one epoch changes something"
    assert f"test accuracy before training {expected['accuracy']:.4f}" in " ".join(printed.out.split())


def test_a_contradiction_between_template_and_format_is_pointed_out(folder, table, tmp_path, capsys):
    flags = {
        "model": str(folder),
        "dataset": str(table),
        "output_dir": str(tmp_path),
        "prompt_template": "Answer: X\nReasoning: Y",
    }
    set_up(resolve(flags))
    printed = capsys.readouterr().err
    assert "answer-first, as --prompt-template states it" in printed and "asks for" not in printed
    run = set_up(resolve(flags | {"response_format": "answer-only"}))
    printed = capsys.readouterr().err
    assert "--prompt-template asks for answer-first, --response-format says answer-only" in printed
    assert run.classifier.prompts.responses[0] == "Answer: dark"
    scores = score_split(run.classifier, run.data.test)
    assert scores.shape == (len(run.data.test), 2)
