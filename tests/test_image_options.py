"""Image options: training's defaults and flags on a published folder, and that the saved folder keeps them at
inference."""

import json

import pytest
import torch
from commands import train
from hub_layout_qwen2_vl import save_published
from tiny import NAMES, random_image, save_classifier, save_tiny_model, tiny_prompts

from vlm.classifier.classifier import VLMClassifier
from vlm.common.errors import UsageError
from vlm.config import parse_arguments, resolve
from vlm.families import load_family
from vlm.inference.predictor import load_model_and_metadata

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def smolvlm(tmp_path_factory):
    """A folder as published: images enlarged to four tiles' width and split into 16 of them, and the whole image."""
    folder = save_tiny_model(tmp_path_factory.mktemp("smolvlm"))
    path = folder / "processor_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["image_processor"] |= {"do_image_splitting": True, "size": {"longest_edge": 64}}
    path.write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return save_published(tmp_path_factory.mktemp("qwen"))


def image_tokens(family) -> int:
    ids = family.encode_images([random_image(0, 504, 504)]).token_ids[0]
    return ids.count(family.image_token_id)


def trained(folder, images):
    """The family as a training run loads it; the flags are read as from the command line."""
    return load_family(folder, torch.float32, CPU, resolve(parse_arguments(images)).image_options())


def at_inference(family, folder):
    """The family that inference loads from what a training run saved."""
    prompts = tiny_prompts(tuple(NAMES))
    metadata = {"class_names": NAMES, "prompts": prompts.to_json()}
    save_classifier(folder, VLMClassifier(family, prompts), metadata, torch.float32)
    return load_model_and_metadata(folder, device="cpu")[0].family


@pytest.mark.parametrize(
    ("model", "flags", "tokens"),
    [
        ("smolvlm", [], 4),
        ("smolvlm", ["--image-splitting"], 17 * 4),
        ("qwen", [], 256),
        ("qwen", ["--max-pixels", "31360"], 36),
        ("qwen", ["--max-pixels", "9999999", "--min-pixels", "392000"], 529),
    ],
)
def test_training_decides_and_inference_keeps_it(model, flags, tokens, request, tmp_path):
    family = trained(request.getfixturevalue(model), flags)
    assert image_tokens(family) == tokens
    assert image_tokens(at_inference(family, tmp_path / "model")) == tokens


def test_without_a_training_run_the_folder_decides(smolvlm, qwen):
    assert image_tokens(load_family(smolvlm, torch.float32, CPU)) == 17 * 4
    assert image_tokens(load_family(qwen, torch.float32, CPU)) == 324


def test_a_model_saved_without_splitting_can_be_trained_on_with_it(smolvlm, tmp_path):
    at_inference(trained(smolvlm, []), tmp_path / "first")
    assert image_tokens(trained(tmp_path / "first", [])) == 4
    assert image_tokens(trained(tmp_path / "first", ["--image-splitting"])) == 17 * 4


def test_an_option_of_another_family_is_refused_by_name(smolvlm, qwen):
    with pytest.raises(
        UsageError, match=r"--max-pixels is for Qwen2-VL and Qwen2\.5-VL: leave it out, or use --image-splitting"
    ):
        trained(smolvlm, ["--max-pixels", "3136"])
    with pytest.raises(
        UsageError, match=r"--image-splitting is for SmolVLM: leave it out, or use --min-pixels, --max-pixels"
    ):
        trained(qwen, ["--image-splitting"])


def test_wrong_numbers_are_refused():
    with pytest.raises(UsageError) as error:
        resolve({"min_pixels": 0, "num_crops": -1})
    assert "--min-pixels 0" in str(error.value) and "--num-crops -1" in str(error.value)
    with pytest.raises(UsageError, match="--min-pixels 9000: expected no more than --max-pixels 4000"):
        resolve({"min_pixels": 9000, "max_pixels": 4000})


def test_the_command_line_says_so(tmp_path, capsys):
    assert (
        train("--demo", "--max-samples", 100, "--num-crops", 4, "--max-pixels", 784, "--output-dir", tmp_path / "out")
        == 2
    )
    assert "is for" in capsys.readouterr().err
