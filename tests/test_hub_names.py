"""The five models by their names on the hub: small models of the true architecture in a local cache, with no hub in
reach."""

import json
import shutil
from pathlib import Path

import hub_layout_phi3_vision
import hub_layout_qwen2_vl
import hub_layout_smolvlm
import pytest
from commands import classify, train
from tiny import random_image
from transformers import AutoModelForImageTextToText

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODELS = {
    "HuggingFaceTB/SmolVLM-256M-Instruct": lambda folder: hub_layout_smolvlm.save_published(folder, "256M"),
    "HuggingFaceTB/SmolVLM-500M-Instruct": lambda folder: hub_layout_smolvlm.save_published(folder, "500M"),
    "HuggingFaceTB/SmolVLM-Instruct": lambda folder: hub_layout_smolvlm.save_published(folder, "2.2B"),
    "Qwen/Qwen2-VL-2B-Instruct": hub_layout_qwen2_vl.save_published,
    "microsoft/Phi-3.5-vision-instruct": hub_layout_phi3_vision.save_published,
}
IMAGE_TOKENS = {
    "HuggingFaceTB/SmolVLM-256M-Instruct": 64,
    "HuggingFaceTB/SmolVLM-500M-Instruct": 64,
    "HuggingFaceTB/SmolVLM-Instruct": 81,
    "microsoft/Phi-3.5-vision-instruct": 313,
}
PUBLISHED_SIZE = {
    "HuggingFaceTB/SmolVLM-256M-Instruct": 512,
    "HuggingFaceTB/SmolVLM-500M-Instruct": 512,
    "HuggingFaceTB/SmolVLM-Instruct": 384,
}


def into_cache(cache: Path, name: str) -> None:
    """Lay a model out in a hub cache as a download does."""
    repository = cache / ("models--" + name.replace("/", "--"))
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    MODELS[name](repository / "snapshots" / COMMIT)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for label, name in enumerate(("ridge", "crater")):
        (folder / name).mkdir()
        for i in range(5):
            random_image(10 * label + i, 40 + 10 * i, 60).save(folder / name / f"{i}.png")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_train_save_and_predict_by_name(name, dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    into_cache(tmp_path / "cache", name)
    output = tmp_path / "out"
    size = ("--image-size", PUBLISHED_SIZE[name]) if name in PUBLISHED_SIZE else ()
    assert (
        train("--model", name, "--dataset", dataset, "--epochs", 1, "--batch-size", 2, "--output-dir", output, *size)
        == 0
    )
    printed = capsys.readouterr().err
    if name in IMAGE_TOKENS:
        assert f"{IMAGE_TOKENS[name]} of them image tokens" in printed
    metadata = json.loads((output / "best_model" / "training_metadata.json").read_text())
    assert (metadata["model"], metadata["model_revision"]) == (name, COMMIT)
    shutil.rmtree(tmp_path / "cache")  # the model folder answers every question that inference has
    table = output / "predictions.jsonl"
    assert classify("--model-dir", output / "best_model", dataset, "--output", table, "--explain") == 0
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    assert len(rows) == 10 and {row["prediction"] for row in rows} <= {"ridge", "crater"}
    assert all(abs(sum(row["probabilities"].values()) - 1) < 1e-5 for row in rows)
    if not name.startswith("microsoft/"):  # the one whose architecture transformers does not know
        _, report = AutoModelForImageTextToText.from_pretrained(output / "best_model", output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
