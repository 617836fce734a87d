"""Whole scripts as a user runs them: the shell script, training on a published kind of model, what it leaves, and its
use."""

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from commands import MODEL_FOLDER, ROOT, TRACEBACK, names_in, run, surroundings, train
from PIL import Image
from safetensors.torch import load_file
from test_data import images
from test_sources import CODES, mars

pytestmark = pytest.mark.slow  # they share runs of many seconds

MARS = json.loads((ROOT / "tests" / "data" / "mars.json").read_text())
COMMIT = "0123456789abcdef" * 2 + "76543210"
OWN_METRICS = """
import numpy as np
def sure(labels, predictions, probabilities, class_names):
    right = np.mean(labels == predictions)
    return {"mean": probabilities.max(axis=1).mean(), "right": right, "classes": len(class_names)}
"""


@pytest.fixture(scope="module")
def mars_run(tiny_model, tmp_path_factory):
    """The long Mars example, typed in a folder of the user's own; that folder, and what the script printed."""
    folder = tmp_path_factory.mktemp("mars") / "my work"
    folder.mkdir()
    mars().save_to_disk(str(folder / "mars data"))
    (folder / "metrics.py").write_text(OWN_METRICS)
    result = run(
        "run_vlm_training.sh",
        *("--model", tiny_model, "--dataset", "mars data", "--class-names", MARS["class_names"]),
        *("--system-instructions", MARS["system_instructions"], "--prompt-template", MARS["prompt_template"]),
        *("--task-description", "Martian landform (DoMars16k) classification", "--epochs", 1, "--batch-size", 4),
        *(
            "--gradient-accumulation-steps",
            1,
            "--eval-batch-size",
            32,
            "--learning-rate",
            5e-3,
            "--metrics",
            "metrics.py:sure",
            "--use-wandb",
        ),
        cwd=folder,
    )
    assert result.returncode == 0, result.stderr
    return folder, result


@pytest.fixture(scope="module")
def results(mars_run):
    """What stands in results.json."""
    return json.loads((mars_run[0] / "vlm_results" / "results.json").read_text())


def test_the_texts_of_the_long_example_arrive_unchanged(mars_run):
    for place in ("", "best_model", "final_model"):
        metadata = json.loads((mars_run[0] / "vlm_results" / place / "training_metadata.json").read_text())
        filled = {"{classes}": ", ".join(CODES), "{task_description}": "Martian landform (DoMars16k) classification"}
        system, question = MARS["system_instructions"], MARS["prompt_template"]
        assert (
            metadata["settings"]["system_instructions"] == system
            and metadata["settings"]["prompt_template"] == question
        )
        for key, value in filled.items():
            system, question = system.replace(key, value), question.replace(key, value)
        assert metadata["prompts"]["system"] == system and metadata["prompts"]["question"] == question
        assert metadata["class_names"] == CODES == MARS["class_names"].split()
        assert metadata["prompts"]["responses"][9].endswith("this appears to be cra.\nAnswer: cra")


def test_results_go_to_stdout_and_all_else_to_stderr(mars_run):
    result = mars_run[1]
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["class", "precision", "recall", "F1", "images"]
    assert [line.split()[0] for line in lines[2:17]] == CODES
    assert any(line.startswith("test accuracy") for line in lines) and lines[-1].startswith("sure")
    for text in (
        "unused splits",
        "trained parameters",
        "One sample as the model sees it",
        "validation accuracy",
        "inference_vlm.py --model-dir",
    ):
        assert text in result.stderr and text not in result.stdout.replace("validation accuracy  ", "")
    assert TRACEBACK not in result.stderr and "Warning" not in result.stderr


def test_the_end_names_the_report_and_the_warnings(mars_run, results):
    lines = mars_run[1].stderr.splitlines()
    report = next(i for i, line in enumerate(lines) if line.endswith("look at vlm_results/report.html first."))
    expected = [f"warning: {results['picture_check']['warning']}"]
    assert "nothing shows that the image matters" in expected[0] and lines[report + 1 :] == expected


def test_the_output_folder_holds_these_files_and_no_others(mars_run):
    output = mars_run[0] / "vlm_results"
    assert names_in(mars_run[0]) == {"vlm_results", "mars data", "metrics.py"}
    assert names_in(output) == {
        ".run_files.json",
        "best_model",
        "final_model",
        "training_metadata.json",
        "results.json",
        "training_curves.png",
        "confusion_matrix.png",
        "label_issues.csv",
        "log.jsonl",
        "report.html",
        "wandb",
        "reliability.png",
    }
    assert names_in(output / "best_model") == names_in(output / "final_model") == MODEL_FOLDER | {"adapter"}
    for name in ("training_curves.png", "confusion_matrix.png", "reliability.png"):
        with Image.open(output / name) as image:
            image.load()
            assert min(image.size) > 400


def test_all_files_of_a_model_folder_can_be_read_by_the_same_people(demo_run):
    (demo_run.parent / "file").touch()
    mode = (demo_run.parent / "file").stat().st_mode
    for name in ("best_model", "final_model", "demo_model"):
        assert {
            path.name: path.stat().st_mode
            for path in (demo_run / name).rglob("*")
            if path.is_file() and path.stat().st_mode != mode
        } == {}


def test_results_json_tells_the_whole_story(mars_run, results):
    assert set(results) == {
        "test",
        "texts",
        "picture_check",
        "overlap",
        "probe",
        "validation",
        "pictures",
        "timings",
        "device",
        "image_size",
        "versions",
        "settings",
        "history",
        "label_issues",
    }
    test = results["test"]
    assert {"accuracy", "macro_f1", "weighted_f1", "per_class", "confusion_matrix", "nll", "loss"} <= set(test)
    assert list(test["per_class"]) == CODES and sum(map(sum, test["confusion_matrix"])) == 30
    assert test["accuracy"] == sum(row[i] for i, row in enumerate(test["confusion_matrix"])) / 30
    assert results["pictures"] == {"train": 60, "validation": 15, "test": 30, "skipped": 0}
    assert all(value > 0 for name, value in results["timings"].items() if name != "tested_at")
    assert {"torch", "transformers", "python", "vlm"} <= set(results["versions"])
    assert results["texts"]["texts"] == 30 and results["settings"]["tune"] == "lora"


def test_what_is_said_about_trust_stands_beside_the_accuracy(results):
    test, check = results["test"], results["picture_check"]
    calibration = test["calibration"]
    assert calibration["temperature"] == 1 and "15 validation images are fewer than 20" in calibration["remarks"][0]
    for state in ("before", "after"):
        assert calibration[state]["accuracy"][0] == test["accuracy"] and set(calibration[state]) == {
            "accuracy",
            "nll",
            "brier",
            "ece",
        }
        assert sum(count for _, _, count in calibration["reliability"][state]) == 30
    assert results["probe"] is None and "abstention" not in test, "they were not asked for"
    assert check["pictures"] == 30 and check["chance"] == pytest.approx(1 / 15)


def test_own_metrics_stand_in_the_results(results):
    own = results["test"]["own_metrics"]["sure"]
    assert (
        own["classes"] == 15
        and own["right"] == pytest.approx(results["test"]["accuracy"])
        and 1 / 15 < own["mean"] <= 1
    )


def test_the_log_has_a_line_for_every_ten_steps_and_every_evaluation(mars_run, results):
    entries = [json.loads(line) for line in (mars_run[0] / "vlm_results" / "log.jsonl").read_text().splitlines()]
    *entries, tested = entries
    assert [(entry["kind"], entry["step"]) for entry in entries] == [("train", 10), ("train", 15), ("validation", 15)]
    assert (tested["kind"], tested["step"]) == ("test", 15)
    assert tested["accuracy"] == results["test"]["accuracy"]
    assert all(math.isfinite(entry["loss"]) for entry in entries)
    assert results["history"] == [{key: value for key, value in entry.items() if key != "time"} for entry in entries]
    assert entries[1]["loss"] < entries[0]["loss"], "nothing was learned"


def test_weights_and_biases_records_offline_with_its_real_client(mars_run):
    (record,) = (mars_run[0] / "vlm_results" / "wandb").glob("offline-run-*/*.wandb")
    content = record.read_bytes()
    for name in (b"train/loss", b"validation/accuracy", b"learning_rate"):
        assert name in content


USE_WITHOUT_THIS_PROGRAM = """
import importlib.util, json, sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
assert importlib.util.find_spec("vlm") is None
folder, image = sys.argv[1], Image.open(sys.argv[2]).convert("RGB")
metadata = json.load(open(folder + "/training_metadata.json"))
model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
messages = [
    {"role": "system", "content": [{"type": "text", "text": metadata["prompts"]["system"]}]},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": metadata["prompts"]["question"]}]},
]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(text=text, images=[image], return_tensors="pt")
ids = model.generate(**inputs, do_sample=False, max_new_tokens=20)
text = processor.batch_decode(ids[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)[0]
print(json.dumps({"logits": list(model(**inputs).logits.shape), "text": text.strip()}))
"""


def test_the_model_folder_works_in_transformers_without_this_program(mars_run, tmp_path):
    from inference_vlm import load_model_and_metadata
    from vlm.data import Sample, open_image

    output, image = mars_run[0] / "vlm_results", tmp_path / "a.png"
    Image.radial_gradient("L").save(image)
    for place in ("best_model", "final_model"):
        weights = load_file(output / place / "model.safetensors")
        assert not [name for name in weights if "lora" in name or "base_layer" in name]
    arguments = [sys.executable, "-c", USE_WITHOUT_THIS_PROGRAM, output / "best_model", image]
    result = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, env=surroundings(PYTHONPATH=None))
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout)
    model, processor, _ = load_model_and_metadata(output / "best_model", device="cpu")
    ours = model.write(model.read(model.collate(with_response=False)([Sample(open_image(image), 0, "a")])))[0]
    assert len(seen["text"]) > 0 and ours.startswith(seen["text"]), (
        "the same model, read by others, writes the same text"
    )
    assert seen["logits"][0] == 1 and seen["logits"][2] == len(processor.tokenizer)


def test_the_trained_model_classifies_images_from_another_folder(mars_run, tmp_path):
    dataset = images(tmp_path / "new images", {"ael": 2, "cra": 1})
    result = run("inference_vlm.py", "--model-dir", mars_run[0] / "vlm_results" / "best_model", dataset, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert [line.split()[-4] in CODES for line in result.stdout.splitlines()[2:]] == [True] * 3


def test_a_model_of_the_hub_is_tuned_from_the_cache_alone(tiny_model, tmp_path):
    repository = tmp_path / "huggingface" / "hub" / "models--HuggingFaceTB--SmolVLM-256M-Instruct"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(tiny_model, repository / "snapshots" / COMMIT)
    result = run(
        "run_vlm_training.sh",
        *(
            "--model",
            "HuggingFaceTB/SmolVLM-256M-Instruct",
            "--dataset",
            images(tmp_path / "data", {"cat": 5, "dog": 6}),
        ),
        *("--epochs", 1, "--output-dir", tmp_path / "out"),
        **{"HF_HOME": tmp_path / "huggingface", "HF_HUB_OFFLINE": 1},
    )
    assert result.returncode == 0, result.stderr
    metadata = json.loads((tmp_path / "out" / "best_model" / "training_metadata.json").read_text())
    assert (metadata["model"], metadata["model_revision"]) == ("HuggingFaceTB/SmolVLM-256M-Instruct", COMMIT)
    assert metadata["settings"]["tune"] == "lora" and metadata["class_names"] == ["cat", "dog"]
    assert "HF_HUB_OFFLINE is set: using the cached copy of model HuggingFaceTB/SmolVLM-256M-Instruct" in result.stderr
    before, after = (
        load_file(tiny_model / "model.safetensors"),
        load_file(tmp_path / "out" / "final_model" / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {
        name for name in before if "connector" in name or ("text_model" in name and name.endswith("_proj.weight"))
    }
    assert changed == expected, (
        "LoRA is merged into the language model's linear layers, the connector is trained, the rest is as it was"
    )


def test_two_processes_train_as_one_with_twice_the_batch(tmp_path):
    """25 images in steps of 8: in the last step one process has an image, and the other has none. Classes have 2 or 3
    each."""
    flags = [
        "--demo",
        "--max-samples",
        25,
        "--epochs",
        1,
        "--device",
        "cpu",
        "--learning-rate",
        1e-3,
        "--class-balance",
    ]
    result = run("run_vlm_training.sh", *flags, "--batch-size", 4, "--output-dir", tmp_path / "two", VLM_PROCESSES=2)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("One sample as the model sees it") == 1, "only one of them speaks"
    assert train(*flags, "--batch-size", 8, "--output-dir", tmp_path / "one") == 0
    start, one, two = (
        load_file(tmp_path / folder / "model.safetensors")
        for folder in ("one/demo_model", "one/final_model", "two/final_model")
    )
    assert one.keys() == two.keys()
    difference, moved = (
        math.sqrt(sum((a[name].double() - b[name].double()).square().sum().item() for name in one))
        for a, b in ((one, two), (one, start))
    )
    # Sums in another order differ in the seventh digit; AdamW divides by the gradient's size, which keeps it at that
    # (2e-6 was measured). An image that is counted twice or not at all changes more than a hundredth.
    assert difference < 1e-4 * moved
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for ours, theirs in zip(*logs, strict=True):
        assert (ours["kind"], ours["step"]) == (theirs["kind"], theirs["step"])
        if "loss" in ours:  # the line of the test has none
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert names_in(tmp_path / "two") == names_in(tmp_path / "one")
