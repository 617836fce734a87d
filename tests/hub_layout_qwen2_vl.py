"""Small Qwen2-VL and Qwen2.5-VL models in the files that the published ones have on the hub.

The layout is that of Qwen/Qwen2-VL-2B-Instruct and Qwen/Qwen2.5-VL-3B-Instruct: a flat config.json of transformers
4.4x, sharded weights under the old names (`visual.*`, `model.layers.*`), preprocessor_config.json, chat_template.json,
tokenizer files. The numbers are smaller.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from family_checks import randomize
from tiny import NAMES, tiny_prompts
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AddedToken, AutoConfig, AutoModelForImageTextToText, Qwen2Tokenizer

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
SYSTEM = "You are a helpful assistant."
# <|im_start|>{role}\n ... <|im_end|>\n for each turn, a system turn first, an image as three tokens.
CHAT_TEMPLATE = (
    "{%- if messages and messages[0].role != 'system' -%}{{ '<|im_start|>system\\n"
    + SYSTEM
    + "<|im_end|>\\n' }}{%- endif -%}"
    "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string -%}{{ message.content }}{%- else -%}"
    "{%- for part in message.content -%}"
    "{%- if part.type in ('image', 'video') -%}{{ '<|vision_start|><|' + part.type + '_pad|><|vision_end|>' }}"
    "{%- elif part.type == 'text' -%}{{ part.text }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{{ '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
PREPROCESSOR = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
}
VISION = {
    "qwen2_vl": {
        "depth": 2,
        "embed_dim": 32,
        "mlp_ratio": 4,
        "num_heads": 2,
        "in_chans": 3,
        "hidden_size": 64,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    },
    "qwen2_5_vl": {
        "depth": 2,
        "hidden_act": "silu",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "in_chans": 3,
        "out_hidden_size": 64,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 56,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
}
CLASSES = {
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", "Qwen2VLProcessor"),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLProcessor"),
}


def save_published(
    folder: Path, model_type: str = "qwen2_vl", tie: bool = True, corpus: list[str] | None = None, **changes: Any
) -> Path:
    """Write a small model with random weights under the file names, keys and settings of the published one.

    Args:
        tie: whether the head is the embedding, as in the 2B and 3B models but not in the 7B ones.
        corpus: texts to train the tokenizer on; default: the conversation of the tests.
        changes: keys of config.json to change.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prompts = tiny_prompts(tuple(NAMES))
    tokenizer = train_tokenizer(corpus or [prompts.system, prompts.question, *prompts.responses])
    _write(folder, "config.json", published_config(tokenizer, model_type, tie) | changes)
    processor_class = CLASSES[model_type][1]
    _write(folder, "preprocessor_config.json", PREPROCESSOR | {"processor_class": processor_class})
    _write(folder, "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    _save_tokenizer(folder, tokenizer, processor_class)
    end, text = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    randomize(model)
    with tempfile.TemporaryDirectory() as other:
        model.save_pretrained(other, max_shard_size="200KB")
        for file in Path(other).glob("*.safetensors*"):
            (folder / file.name).write_bytes(file.read_bytes())
    generation = {
        "bos_token_id": text,
        "pad_token_id": text,
        "do_sample": True,
        "eos_token_id": [end, text],
        "temperature": 0.01,
    }
    _write(folder, "generation_config.json", generation | {"repetition_penalty": 1.0, "top_p": 0.001, "top_k": 1})
    return folder


def train_tokenizer(corpus: list[str]) -> Qwen2Tokenizer:
    """A byte-level BPE of Qwen's own class, the special tokens behind the vocabulary."""
    bpe = Tokenizer(models.BPE())
    qwen = Qwen2Tokenizer().backend_tokenizer
    bpe.normalizer, bpe.pre_tokenizer = qwen.normalizer, qwen.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        corpus * 4, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    learned = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=learned["vocab"], merges=[tuple(pair) for pair in learned["merges"]])
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


def published_config(tokenizer: Qwen2Tokenizer, model_type: str, tie: bool) -> dict[str, Any]:
    """config.json as transformers 4.4x wrote it: the language model's settings at the top."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    return {
        "architectures": [CLASSES[model_type][0]],
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "max_position_embeddings": 32768,
        "max_window_layers": 2,
        "model_type": model_type,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": tie,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": VISION[model_type],
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "vocab_size": len(tokenizer) + 7,  # larger than the tokenizer, as published
    }


def _save_tokenizer(folder: Path, tokenizer: Qwen2Tokenizer, processor_class: str) -> None:
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    learned = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    _write(folder, "vocab.json", learned["vocab"])
    lines = [" ".join(pair) for pair in learned["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]) + "\n", encoding="utf-8")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {str(tokenizer.convert_tokens_to_ids(token)): {"content": token, **flags} for token in SPECIAL_TOKENS}
    _write(
        folder,
        "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "added_tokens_decoder": added,
            "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
            "bos_token": None,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": 32768,
            "pad_token": "<|endoftext|>",
            "padding_side": "left",
            "processor_class": processor_class,
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )


def _write(folder: Path, name: str, values: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
