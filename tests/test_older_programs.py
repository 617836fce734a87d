"""Folders are written with names that transformers 4 knows too, and that transformers 5 reads as the same."""

import json

import hub_layout_phi3_vision
import hub_layout_qwen2_vl
import hub_layout_smolvlm
import pytest
import torch
from tiny import save_tiny_model, tiny_prompts
from transformers import AutoConfig, AutoTokenizer

from vlm.families import load_family

BUILDERS = {
    "smolvlm": save_tiny_model,
    "qwen2_vl": hub_layout_qwen2_vl.save_published,
    "phi3_v": hub_layout_phi3_vision.save_published,
}


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def saved(builder, folder, **changes):
    """The folder that is saved after a model was loaded, and its family."""
    (folder / "model").mkdir()
    builder(folder / "model", **changes)
    family = load_family(folder / "model", torch.float32, torch.device("cpu"), {})
    (folder / "saved").mkdir()
    family.save(folder / "saved", dict(family.model.state_dict()), torch.float32)
    return folder / "saved", family


@pytest.mark.parametrize(
    ("builder", "changes", "named"),
    [
        (
            hub_layout_smolvlm.save_published,
            {"rope_parameters": {"rope_type": "default", "rope_theta": 273768.0}},
            {"rope_theta": 273768.0},
        ),
        (
            hub_layout_qwen2_vl.save_published,
            {"rope_theta": 5e5, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
            {"rope_theta": 5e5, "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [2, 3, 3]}},
        ),
    ],
)
def test_positions_are_described_for_version_4_and_read_by_version_5(builder, changes, named, tmp_path):
    """Version 4 takes its own rope_theta if it finds none, and cannot run Qwen2-VL without mrope_section."""
    folder, family = saved(builder, tmp_path, **changes)
    text = read(folder / "config.json")["text_config"]
    assert {name: text.get(name) for name in ("rope_theta", "rope_scaling") if name in text} == named
    before, after = family.model.config.get_text_config(), AutoConfig.from_pretrained(folder).get_text_config()
    assert (
        after.rope_parameters == before.rope_parameters and after.rope_parameters["rope_theta"] == named["rope_theta"]
    )


@pytest.mark.parametrize("kind", ["smolvlm", "qwen2_vl"])
def test_image_settings_are_in_the_file_that_every_version_reads(kind, tmp_path):
    folder, family = saved(BUILDERS[kind], tmp_path)
    images = read(folder / "preprocessor_config.json")
    assert "image_processor" not in read(folder / "processor_config.json"), "before 4.57 a processor fails on it"
    assert images["image_processor_type"].startswith(type(family.processor.image_processor).__name__[:8])
    again = load_family(folder, torch.float32, torch.device("cpu")).processor
    assert again.image_processor.to_dict() == family.processor.image_processor.to_dict()
    assert getattr(again, "image_seq_len", None) == getattr(family.processor, "image_seq_len", None)


def test_the_language_model_of_the_demo_has_a_name_for_converters(tmp_path):
    """llama.cpp's converter takes the architecture of the text half from there; published folders have it."""
    folder, _ = saved(save_tiny_model, tmp_path)
    assert read(folder / "config.json")["text_config"]["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_folder_has_no_setting_that_breaks_other_programs(kind, tmp_path):
    folder, family = saved(BUILDERS[kind], tmp_path)
    tokenizer = read(folder / "tokenizer_config.json")
    assert tokenizer["tokenizer_class"] != "TokenizersBackend", "a class of transformers 5 only"
    assert not isinstance(tokenizer.get("extra_special_tokens"), list), "transformers 4 takes a dictionary"
    assert not tokenizer.keys() & {"is_local", "local_files_only", "backend"}
    assert "_attn_implementation" not in read(folder / "config.json")
    again = AutoTokenizer.from_pretrained(folder)
    text = " ".join([tiny_prompts().system, *family.tokenizer.all_special_tokens, "x  y"])
    assert again(text)["input_ids"] == family.tokenizer(text)["input_ids"]
    assert set(again.all_special_tokens) == set(family.tokenizer.all_special_tokens)
