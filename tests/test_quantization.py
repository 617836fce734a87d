"""Weights in 4 and 8 bits: what is asked for is checked; where bitsandbytes is installed, that they train and are saved
as plain ones."""

import importlib.util
import json
import sys
from types import SimpleNamespace

import hub_layout_phi3_vision
import hub_layout_qwen2_vl
import pytest
import torch
from commands import train
from peft.utils.integrations import dequantize_module_weight
from tiny import NAMES, random_image, samples, save_classifier, save_tiny_model, tiny_prompts
from transformers import AutoModelForImageTextToText

from vlm.classifier.classifier import VLMClassifier
from vlm.common.errors import UsageError
from vlm.config import resolve
from vlm.families import load_family, quantization
from vlm.families.quantization import check_quantization, loading_options
from vlm.inference.predictor import load_model_and_metadata
from vlm.training.tuning import parameter_groups, prepare_tuning

CPU = torch.device("cpu")
installed = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not installed, reason="bitsandbytes is not installed")
BUILDERS = {
    "smolvlm": save_tiny_model,
    "qwen2_vl": hub_layout_qwen2_vl.save_published,
    "phi3_v": hub_layout_phi3_vision.save_published,
}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, "exclude each other"),
        ({"load_in_4bit": True, "tune": "full"}, "--load-in-4bit needs --tune lora, not full"),
        ({"load_in_8bit": True, "tune": "connector"}, "--load-in-8bit needs --tune lora, not connector"),
        ({"load_in_8bit": True, "demo": True}, "--load-in-8bit needs --tune lora, not full"),
    ],
)
def test_flags_that_do_not_go_together(given, message):
    with pytest.raises(UsageError, match=message):
        resolve(given)


def test_without_bitsandbytes_the_command_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    assert train("--model", tmp_path, "--load-in-4bit", "--output-dir", tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert "error: --load-in-4bit needs bitsandbytes: pip install" in message
    assert "Traceback" not in message


def test_a_device_that_bitsandbytes_does_not_know(monkeypatch):
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(
        sys.modules, "bitsandbytes", SimpleNamespace(__version__="1.0", supported_torch_devices={"cuda", "xpu"})
    )
    check_quantization(4, torch.device("cuda"))
    with pytest.raises(UsageError, match="1.0 does not work on cpu .it knows cuda, xpu"):
        check_quantization(8, CPU)


def test_nothing_is_asked_of_the_loader_without_the_flags():
    check_quantization(None, CPU)
    assert loading_options(None, torch.float32, CPU, []) == {}


# With bitsandbytes


def quantized(folder, bits: int, variant: str) -> VLMClassifier:
    family = load_family(folder, torch.float32, CPU, {}, bits)
    prepare_tuning(family, resolve({"tune": "lora", "lora_dropout": 0.0, "lora_variant": variant}))
    return VLMClassifier(family, tiny_prompts(tuple(NAMES[:4])))


def probabilities(classifier: VLMClassifier) -> torch.Tensor:
    return classifier.score(classifier.read(classifier.collate(with_response=False)(samples([0, 1, 2])))).softmax(-1)


def multiply_plainly(classifier: VLMClassifier) -> None:
    """Use the values of the quantized weights without rounding the layers' inputs, as the product of 8 bits does."""
    for module in classifier.model.modules():
        if module.__class__.__name__ in ("Linear4bit", "Linear8bitLt") and not hasattr(module, "base_layer"):
            weight = dequantize_module_weight(module).float()
            module.forward = lambda x, weight=weight, bias=module.bias: torch.nn.functional.linear(x, weight, bias)


@pytest.mark.slow
@needs_bitsandbytes
@pytest.mark.parametrize(("bits", "variant"), [(4, "lora"), (8, "lora"), (4, "dora")])
@pytest.mark.parametrize("kind", BUILDERS)
def test_only_the_language_model_is_quantized_and_the_saved_model_is_a_plain_one(kind, bits, variant, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    BUILDERS[kind](folder)
    classifier = quantized(folder, bits, variant)
    family = classifier.family
    inside = {id(module) for module in family.language.modules()}
    for module in family.model.modules():
        if isinstance(module, torch.nn.Linear) and not hasattr(module, "base_layer"):
            small = module.weight.dtype in (torch.uint8, torch.int8)
            lora = module.weight.requires_grad and id(module) in inside
            assert lora or small == (id(module) in inside)

    optimizer = torch.optim.AdamW(parameter_groups(classifier, 0.0, 0.01, 0.01))
    classifier.train()
    losses = []
    for _ in range(4):
        loss = classifier(classifier.collate(with_response=True)(samples([0, 1, 2, 3]))).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0], "it should learn through the quantized weights"

    classifier.eval()
    expected = probabilities(classifier)
    before = {name: tensor.clone() for name, tensor in classifier.model.state_dict().items()}
    save_classifier(
        tmp_path / "saved",
        classifier,
        {"class_names": NAMES[:4], "prompts": classifier.prompts.to_json()},
        torch.float32,
    )
    after = classifier.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items()), "saving must not touch the model"

    config = json.loads((tmp_path / "saved/config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
    loaded, _, _ = load_model_and_metadata(tmp_path / "saved", device="cpu")
    saved = probabilities(loaded)
    multiply_plainly(classifier.eval())  # eval() forgets the prefix that was kept
    merged, rounded = (float((saved - other).abs().max()) for other in (probabilities(classifier), expected))
    print(f"\n{kind} | {bits} bits, saved as a plain model | {merged:.1e} (as trained: {rounded:.1e})")
    assert merged < 2e-5
    assert bits == 8 or rounded < 2e-5


@pytest.mark.slow
@needs_bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
def test_the_whole_command(bits, tmp_path, capsys):
    save_tiny_model(tmp_path / "model")
    for start, name in ((0, "a"), (8, "b")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(8):
            random_image(start + i).save(tmp_path / "data" / name / f"{i}.png")
    out = tmp_path / "out"
    arguments = ("--model", tmp_path / "model", "--dataset", tmp_path / "data", "--epochs", 1, "--output-dir", out)
    assert train(*arguments, f"--load-in-{bits}bit") == 0
    assert f"in {bits} bits" in capsys.readouterr().err
    assert json.loads((out / "results.json").read_text(encoding="utf-8"))["settings"][f"load_in_{bits}bit"] is True
