"""Folders are written with names that transformers 4 knows too, and that transformers 5 reads as the same."""

import json

import hub_layout_phi3_vision
import hub_layout_qwen2_vl
import pytest
import torch
from tiny import save_tiny_model, tiny_prompts
from transformers import AutoTokenizer

from vlm.families import load_family

BUILDERS = {
    "smolvlm": save_tiny_model,
    "qwen2_vl": hub_layout_qwen2_vl.save_published,
    "phi3_v": hub_layout_phi3_vision.save_published,
}


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_folder_has_no_setting_that_breaks_other_programs(kind, tmp_path):
    (tmp_path / "model").mkdir()
    BUILDERS[kind](tmp_path / "model")
    family = load_family(tmp_path / "model", torch.float32, torch.device("cpu"), {})
    (tmp_path / "saved").mkdir()
    family.save(tmp_path / "saved", dict(family.model.state_dict()), torch.float32)
    tokenizer = json.loads((tmp_path / "saved/tokenizer_config.json").read_text(encoding="utf-8"))
    assert tokenizer["tokenizer_class"] != "TokenizersBackend", "a class of transformers 5 only"
    assert not isinstance(tokenizer.get("extra_special_tokens"), list), "transformers 4 takes a dictionary"
    assert not tokenizer.keys() & {"is_local", "local_files_only", "backend"}
    assert "_attn_implementation" not in json.loads((tmp_path / "saved/config.json").read_text(encoding="utf-8"))
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    text = " ".join([tiny_prompts().system, *family.tokenizer.all_special_tokens, "x  y"])
    assert again(text)["input_ids"] == family.tokenizer(text)["input_ids"]
    assert set(again.all_special_tokens) == set(family.tokenizer.all_special_tokens)
