"""The model card: its metadata are those that the hub reads, its code runs, and no text in it becomes markup."""

import json
import re

import pytest
import yaml
from commands import train
from huggingface_hub import ModelCard
from tiny import save_tiny_model

from vlm.classifier import write_freely
from vlm.data import Sample, open_image
from vlm.inference import load_model_and_metadata
from vlm.sharing import model_card, origin_of

HOSTILE = "x\n---\nlicense: mit\n<script>alert(1)</script> [a](http://b) | `c` ```` {{ 7 * 7 }} \u202e *d*"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, whose model learned to write."""
    output = tmp_path_factory.mktemp("card") / "run"
    assert train("--demo", "--max-samples", 40, "--epochs", 1, "--output-dir", output) == 0
    return output


def read(output, name="results.json"):
    return json.loads((output / name).read_text(encoding="utf-8"))


def metadata_of(run):
    return read(run, "best_model/training_metadata.json")


def sections(card):
    return dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", card.text, re.MULTILINE | re.DOTALL))


def test_the_best_model_has_its_test_and_the_final_one_says_that_it_has_none(run):
    card, results = ModelCard.load(run / "best_model/README.md"), read(run)
    measured = {one.metric_type: one for one in card.data.eval_results}
    accuracy, low, high = results["test"]["calibration"]["after"]["accuracy"]
    assert measured["accuracy"].metric_value == pytest.approx(accuracy)
    assert f"95% interval {low:.4f} to {high:.4f}" in measured["accuracy"].metric_name
    assert f"| accuracy | {accuracy:.4f} | {low:.4f} to {high:.4f} |" in card.text
    assert card.data.pipeline_tag == "image-text-to-text" and card.data.library_name == "transformers"
    assert card.data.license is None and card.data.base_model is None, "the demo's model has none"
    per_class = results["test"]["per_class"]
    share = max(one["support"] for one in per_class.values()) / results["pictures"]["test"]
    assert re.search(rf"\| accuracy if always \w+ is answered \| {share:.4f} \|  \|", card.text)
    assert f"on {results['picture_check']['pictures']} of the images, all gray" in card.text
    counts = metadata_of(run)["dataset"]["training_images"]
    assert sum(counts) == results["pictures"]["train"]
    supports = f" +{counts[0]} +{per_class['zero']['support']}\n"
    assert re.search(rf"class +training images +test images\n[- ]+\nzero{supports}", sections(card)["Classes"])
    texts = results["texts"]
    assert f"of {texts['texts']} texts about test" in card.text and f"{texts['invalid']} name no class" in card.text
    assert (
        "pip install ." in sections(card)["Use"] and "| license of the base model | unknown: there is no" in card.text
    )
    assert ModelCard.load(run / "final_model/README.md").data.eval_results is None
    assert sections(ModelCard.load(run / "final_model/README.md"))["Results"].strip() == "Not tested."


def test_the_code_of_the_card_runs_with_only_transformers(run, monkeypatch, capsys):
    """It writes what the model writes in this program."""
    block = re.search(r"```python\n(.*?)```", (run / "best_model/README.md").read_text(), re.DOTALL)[1]
    assert "vlm" not in block
    monkeypatch.chdir(run)
    image, values = run / "demo_images/digit_3.png", {}
    exec(block.replace("image.png", str(image)), values)
    classifier, _, _ = load_model_and_metadata(run / "best_model", device="cpu")
    batch = classifier.collate(with_response=False)([Sample(open_image(image), 0, "digit")])
    (ours,) = write_freely(classifier, classifier.read(batch))
    assert ours and values["text"].strip().startswith(ours)  # ours may stop earlier
    assert capsys.readouterr().out.strip() in values["text"]


def test_texts_that_mostly_disagree_are_warned_of_and_others_are_not(run):
    metadata, results = metadata_of(run), read(run)
    for agree, warned in ((3, True), (30, False)):
        results["texts"] = {"texts": 32, "agree_with_prediction": agree, "invalid": 2}
        assert ("do not use the texts of this model" in model_card(metadata, results).text) == warned
    assert "texts about test" not in model_card(metadata).text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tune": "full"}, "| all weights |"),
        ({"tune": "connector"}, "| the connector between"),
        ({"tune": "lora", "lora_rank": 16, "lora_variant": "pissa"}, "LoRA (pissa, rank 16), which is merged"),
        ({"tune": "lora", "lora_rank": 16}, "into its weights; the connector between"),
        ({"tune": "lora", "lora_rank": 16, "freeze_connector": True}, "which is merged into its weights |"),
    ],
)
def test_the_parts_that_were_trained_are_named(run, settings, words):
    about = model_card(metadata_of(run) | {"settings": settings}).text
    assert words in next(line for line in about.splitlines() if line.startswith("| what was trained |"))


def test_the_calibration_is_told_as_arithmetic(run):
    calibration = {"temperature": 0.25, "score": "prior", "bias": [0.1], "abstain_below": 0.5}
    words = "each log-probability, minus the one that the class has without an image, is divided by a temperature of"
    text = model_card(metadata_of(run) | {"calibration": calibration}).text
    assert f"{words} 0.25, and a number of its class is added. The model gives no prediction below" in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (True, "each log-probability plus 0.5 times the logit of a linear classifier on vision features"),
        (False, "not the response but the logit of a linear classifier on vision features"),
    ],
)
def test_the_evidence_of_a_head_is_told(text, words, run):
    calibration = {"temperature": 0.25, "evidence": 0.5, "text": text}
    card = model_card(metadata_of(run) | {"calibration": calibration}).text
    assert words in " ".join(card.split()) and "evidence/head.safetensors" in card


def test_hostile_texts_stay_texts(run):
    metadata, results = metadata_of(run), read(run)
    results["test"]["per_class"] = {HOSTILE: {"support": 99}} | results["test"]["per_class"]
    metadata["class_names"][0] = metadata["task_description"] = metadata["dataset"]["dataset"] = HOSTILE
    metadata["prompts"]["system"] = metadata["prompts"]["responses"][0] = HOSTILE
    metadata["plain_prompt"] = {"text": HOSTILE, "special_tokens": False}
    card = model_card(metadata, results, [HOSTILE], name="best_model")
    read_back = ModelCard(str(card))
    assert read_back.data.to_dict() == card.data.to_dict() and read_back.data.license is None
    block = str(card).split("\n---\n")[0]
    assert yaml.safe_load(block.removeprefix("---\n"))["model-index"][0]["results"][0]["dataset"]["type"] == "custom"
    outside = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", card.text, flags=re.MULTILINE | re.DOTALL)
    for mark in ("<script>", "[a](", "49", "\u202e", "://", " *d", " `c"):
        assert mark not in outside, mark
    code = re.search(r"^(`{3,})python\n(.*?)^\1$", card.text, re.MULTILINE | re.DOTALL)[2]
    values = {}
    exec(re.search(r"^prompt = .*$", code, re.MULTILINE)[0], values)
    assert values["prompt"] == HOSTILE


def test_a_model_that_transformers_cannot_load_says_so(run):
    metadata = metadata_of(run) | {"plain_prompt": None}
    assert "only with code that comes with it" in model_card(metadata).text
    del metadata["plain_prompt"]  # of an earlier version, which did not write it
    assert "transformers" not in model_card(metadata).text


def test_base_model_dataset_and_license_of_the_hub_are_named(run):
    metadata = metadata_of(run)
    metadata["origin"] = {"hub_id": "a/base", "commit": "c" * 40, "license": "apache-2.0"}
    metadata["dataset"] |= {"dataset": "b/pets", "kind": "hub, Parquet", "commit": "d" * 40, "config": "large"}
    data = model_card(metadata, read(run)).data
    assert (data.base_model, data.datasets, data.license) == ("a/base", "b/pets", "apache-2.0")
    measured = data.eval_results[0]
    assert (measured.dataset_type, measured.dataset_config, measured.dataset_revision) == ("b/pets", "large", "d" * 40)


def test_where_a_model_comes_from_is_read_of_its_folder_and_nothing_else_is_believed(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    assert origin_of(folder, "org/base@main", "c" * 40) == {"hub_id": "org/base", "commit": "c" * 40}
    assert origin_of(folder, str(folder), None) == {"hub_id": None, "commit": None}
    for text, found in [
        ("---\nlicense: apache-2.0\n---\n# x", {"license": "apache-2.0"}),
        ("---\nlicense: other\nlicense_name: mine\nlicense_link: https://x.y\n---\n", {"license": "other"}),
        ("---\nlicense: [mit]\n---\n", {}),
        ("---\nlicense: 'mit\\n<b>'\n---\n", {}),
        ("---\na: &a [x]\nb: [*a, *a\n---\n", {}),
        ("no metadata", {}),
    ]:
        (folder / "README.md").write_text(text, encoding="utf-8")
        origin = origin_of(folder, str(folder), None)
        assert {key: origin[key] for key in ("license",) if key in origin} == found
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    ours = {"origin": {"hub_id": "org/base", "commit": None}}
    (folder / "training_metadata.json").write_text(json.dumps(ours))
    assert origin_of(folder, str(folder), None) == {"hub_id": "org/base", "commit": None, "license": "mit"}
    (folder / "training_metadata.json").write_text(json.dumps({"origin": {"hub_id": "<b>", "commit": None}}))
    assert origin_of(folder, str(folder), None)["hub_id"] is None
