"""The models that this program is made for, and what it takes to train them: `train_vlm.py --list-models`.

Nothing is asked of the hub: the architectures below are those of the published config.json files, without what no size
depends on.
"""

from dataclasses import replace
from typing import Any

import torch

from vlm.common.errors import UsageError
from vlm.common.tables import format_table
from vlm.config.settings import AUTO, TUNING_DEFAULTS, Settings
from vlm.families import Family, outline
from vlm.machine.device import pick_device, pick_dtype
from vlm.machine.memory import GIB, Texts, estimate, free_memory

# https://huggingface.co/NAME/blob/main/config.json. The counted parameters are those that the hub shows for the
# published weights.
SIGLIP_BASE_512 = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 512, "patch_size": 16,
}  # fmt: skip
SIGLIP_SO400M_384 = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "HuggingFaceTB/SmolVLM-256M-Instruct": {
        "model_type": "idefics3", "scale_factor": 4, "tie_word_embeddings": False, "vision_config": SIGLIP_BASE_512,
        "text_config": {
            "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
            "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49280, "max_position_embeddings": 8192,
        },
    },
    "HuggingFaceTB/SmolVLM-500M-Instruct": {
        "model_type": "idefics3", "scale_factor": 4, "tie_word_embeddings": False, "vision_config": SIGLIP_BASE_512,
        "text_config": {
            "model_type": "llama", "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15,
            "num_key_value_heads": 5, "head_dim": 64, "vocab_size": 49280, "max_position_embeddings": 8192,
        },
    },
    "HuggingFaceTB/SmolVLM-Instruct": {
        "model_type": "idefics3", "scale_factor": 3, "tie_word_embeddings": False, "vision_config": SIGLIP_SO400M_384,
        "text_config": {
            "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32,
            "num_key_value_heads": 32, "head_dim": 64, "vocab_size": 49155, "max_position_embeddings": 16384,
        },
    },
    "Qwen/Qwen2-VL-2B-Instruct": {
        "model_type": "qwen2_vl", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": True,
        "vision_config": {
            "depth": 32, "embed_dim": 1280, "hidden_size": 1536, "mlp_ratio": 4, "num_heads": 16, "in_channels": 3, "patch_size": 14,
            "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
    },
    "Qwen/Qwen2.5-VL-3B-Instruct": {
        "model_type": "qwen2_5_vl", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 128000, "tie_word_embeddings": True,
        "vision_config": {
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "in_channels": 3, "patch_size": 14,
            "out_hidden_size": 2048, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    },
    "microsoft/Phi-3.5-vision-instruct": {
        "model_type": "phi3_v", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32064, "max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
        "tie_word_embeddings": False, "pad_token_id": 32000, "img_processor": {"image_dim_out": 1024},
    },
}  # fmt: skip
MARK = "*"
NOT_TAKEN = "-"


def count_parameters(family: Family) -> dict[str, int]:
    """Parameters by part: vision, connector, language (blocks and norms), embeddings (of words, and a head of its
    own)."""
    words = {
        id(p): p
        for m in (family.model.get_input_embeddings(), family.model.get_output_embeddings())
        for p in m.parameters()
    }
    counts = {"vision": family.vision, "connector": family.connector, "language": family.language}
    sizes = {name: sum(p.numel() for p in part.parameters() if id(p) not in words) for name, part in counts.items()}
    return sizes | {"embeddings": sum(p.numel() for p in words.values())}


def list_models(settings: Settings) -> None:
    """Print the table, for the device, number format, batch size and image options of the settings."""
    device, _ = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    free = free_memory(device)
    print(model_table(settings, dtype, device.type, free))
    texts = Texts()
    print(
        f"\nGiB of memory that training takes on {device.type} in {str(dtype).removeprefix('torch.')}, with --batch-size "
        f"{settings.batch_size or 1}, one image a sample,\n{texts.prefix} + {texts.question} + {texts.response} tokens of instructions, "
        f"question and response, {texts.classes} classes. Free now: {free / GIB:.1f} GiB; {MARK} does not fit.\n"
        + (f"{NOT_TAKEN}: does not take --image-size {settings.image_size}.\n" if settings.image_size != AUTO else "")
        + "Any other image-text-to-text model in the layout of transformers can be named too. How it is computed: docs/models.md."
    )


def _with_mode(settings: Settings, mode: str) -> Settings:
    """The settings with a tuning mode; only LoRA is trained on quantized weights."""
    return (
        replace(settings, tune=mode)
        if mode == "lora"
        else replace(settings, tune=mode, load_in_4bit=False, load_in_8bit=False)
    )


def model_table(settings: Settings, dtype: torch.dtype, device: str, free: int) -> str:
    """Name, parameters, context and the GiB of each tuning mode.

    Marked where that is more than `free` bytes; a model that does not take the `--image-size` has none.
    """
    rows = []
    for name, config in MODELS.items():
        family = outline(config)
        context = family.model.config.get_text_config().max_position_embeddings
        try:
            needs = [estimate(family, _with_mode(settings, mode), dtype, device).total for mode in TUNING_DEFAULTS]
            cells = [f"{need / GIB:.1f} {MARK if need > free else ''}" for need in needs]
        except UsageError:
            cells = [NOT_TAKEN] * len(TUNING_DEFAULTS)
        rows.append([name, f"{sum(count_parameters(family).values()) / 1e6:,.0f}M", f"{context:,}", *cells])
    return format_table(rows, ["model", "parameters", "context", *(f"--tune {mode}" for mode in TUNING_DEFAULTS)])
