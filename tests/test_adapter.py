"""What LoRA learned in PEFT's format: it turns the base model into the trained one, for each variant of LoRA."""

import json
import shutil

import hub_layout_phi3_vision
import hub_layout_qwen2_vl
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_tuning import prepared, train_a_little
from tiny import batch_of, save_classifier, save_tiny_model
from transformers import AutoModelForImageTextToText

from vlm.common import UsageError
from vlm.common.checksums import check_checksums
from vlm.config import resolve
from vlm.families import load_family
from vlm.inference import load_model_and_metadata
from vlm.training.adapter import adapter_writer
from vlm.training.tuning import merged_state_dict, prepare_tuning

CPU = torch.device("cpu")
VARIANTS = ["lora", "dora", "rslora", "pissa"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def trained(folder, out, **given):
    """A classifier that was trained a little, whose model folder is written with its adapter."""
    settings = resolve({"tune": "lora", "lora_rank": 4, "model": str(folder)} | given)
    classifier = train_a_little(prepared(folder, **{"tune": "lora", "lora_rank": 4} | given))
    metadata = {"class_names": list(classifier.class_names), "prompts": classifier.prompts.to_json()}
    write = adapter_writer(classifier.family, settings, None)
    save_classifier(out, classifier, metadata, torch.float32, write)
    return classifier


def logits(model, classifier):
    """(L, V) of transformers' own forward over one prompt with an image."""
    batch = batch_of(classifier, [0], with_response=False)
    ids = torch.tensor([classifier.rendered.prefix_ids + batch.input_ids[0].tolist()])
    pixels = {name: tensor.unsqueeze(1) for name, tensor in batch.pixels.items()}
    with torch.no_grad():
        return model(input_ids=ids, **pixels, use_cache=False).logits[0]


@pytest.mark.parametrize("frozen", [False, True], ids=["connector", "only LoRA"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_base_model_with_adapter_equals_the_merged_model_and_the_trained_one(folder, tmp_path, variant, frozen):
    classifier = trained(folder, tmp_path / "model", lora_variant=variant, freeze_connector=frozen)
    base = AutoModelForImageTextToText.from_pretrained(folder)
    before = logits(base, classifier)
    expected = logits(classifier.model, classifier)
    assert (expected - before).abs().max() > 0.1, "the training changed something"
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(merged, classifier), expected, rtol=1e-5, atol=1e-4)
    adapted = PeftModel.from_pretrained(base, tmp_path / "model" / "adapter")
    torch.testing.assert_close(logits(adapted, classifier), expected, rtol=1e-5, atol=1e-4)
    written = json.loads((tmp_path / "model/adapter/adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(folder)
    assert bool(written["modules_to_save"]) != frozen


def test_the_adapter_belongs_to_the_model_folder(folder, tmp_path):
    trained(folder, tmp_path / "model")
    check_checksums(tmp_path / "model", "")
    weights = tmp_path / "model/adapter/adapter_model.safetensors"
    assert weights.stat().st_mode == (tmp_path / "model/config.json").stat().st_mode
    load_model_and_metadata(tmp_path / "model", device="cpu")
    weights.unlink()
    with pytest.raises(UsageError, match="adapter/adapter_model.safetensors is missing"):
        load_model_and_metadata(tmp_path / "model", device="cpu")
    shutil.rmtree(tmp_path / "model/adapter")  # not needed for the merged model
    load_model_and_metadata(tmp_path / "model", device="cpu")


def test_a_model_that_learned_otherwise_has_no_adapter(folder):
    family = load_family(folder, torch.float32, CPU)
    assert adapter_writer(family, resolve({"tune": "connector"}), None) is None
    assert adapter_writer(family, resolve({"tune": "full"}), None) is None


def test_a_connector_that_pefts_format_cannot_hold_is_said(tmp_path, capsys):
    """That of Phi-3.5-vision has learned vectors that are no layers."""
    folder = hub_layout_phi3_vision.save_published(tmp_path / "phi")
    family = load_family(folder, torch.float32, CPU, {})
    settings = resolve({"tune": "lora"})
    prepare_tuning(family, settings)
    assert adapter_writer(family, settings, None) is None
    assert "no adapter/, as model.vision_embed_tokens.glb_GN of the connector is trained" in capsys.readouterr().err
    assert adapter_writer(family, resolve({"tune": "lora", "freeze_connector": True}), None) is not None


def adapter_names(adapter):
    """The weights of the base model that an adapter changes."""
    names = load_file(adapter / "adapter_model.safetensors")
    return {name.partition(".lora_")[0] + (".weight" if ".lora_" in name else "") for name in names}


def test_the_connector_of_another_family_is_kept_whole(tmp_path):
    folder = hub_layout_qwen2_vl.save_published(tmp_path / "qwen")
    family = load_family(folder, torch.float32, CPU, {})
    prepare_tuning(family, resolve({"tune": "lora"}))
    with torch.no_grad():
        for parameter in family.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.ones_like(parameter))
    (tmp_path / "out").mkdir()
    adapter_writer(family, resolve({"tune": "lora"}), None)(tmp_path / "out")
    base = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, tmp_path / "out/adapter").merge_and_unload()
    expected = merged_state_dict(family.model, torch.float32)
    changed = 0
    before = load_family(folder, torch.float32, CPU, {}).model.state_dict()
    for name, tensor in adapted.state_dict().items():  # the patch embedding has another shape here
        torch.testing.assert_close(tensor.flatten(), expected[name].flatten(), rtol=1e-5, atol=1e-6)
        changed += not torch.equal(expected[name], before[name])
    assert changed == len(adapter_names(tmp_path / "out/adapter")), "each weight that was trained"
