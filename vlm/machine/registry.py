"""The models that this program is tested with, and the memory that training them needs: `train_vlm.py --list-models`.

The hub is not asked: below is what the sizes depend on, from the published config.json files.
"""

from typing import Any

import torch

from vlm.common import UsageError, dtype_name, format_table
from vlm.config import AUTO, TUNING_DEFAULTS, Settings
from vlm.families import Family, outline
from vlm.machine.batch_size import free_memory
from vlm.machine.device import pick_device, pick_dtype
from vlm.machine.memory import GIB, Texts, estimate


def _named(names: str, *values: int) -> dict[str, int]:
    return dict(zip(names.split(), values, strict=True))


# The numbers of https://huggingface.co/NAME/blob/main/config.json.
LANGUAGE = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size "
    "max_position_embeddings"
)
SIGLIP = "hidden_size intermediate_size num_hidden_layers num_attention_heads image_size patch_size"
QWEN_VISION = "depth hidden_size num_heads in_channels patch_size spatial_merge_size temporal_patch_size"
SIGLIP_BASE_512 = _named(SIGLIP, 768, 3072, 12, 12, 512, 16)
SIGLIP_SO400M_384 = _named(SIGLIP, 1152, 4304, 27, 16, 384, 14)
MODELS: dict[str, dict[str, Any]] = {
    "HuggingFaceTB/SmolVLM-256M-Instruct": {
        "model_type": "idefics3",
        "scale_factor": 4,
        "tie_word_embeddings": False,
        "vision_config": SIGLIP_BASE_512,
        "text_config": _named(LANGUAGE, 576, 1536, 30, 9, 3, 49280, 8192) | {"model_type": "llama", "head_dim": 64},
    },
    "HuggingFaceTB/SmolVLM-500M-Instruct": {
        "model_type": "idefics3",
        "scale_factor": 4,
        "tie_word_embeddings": False,
        "vision_config": SIGLIP_BASE_512,
        "text_config": _named(LANGUAGE, 960, 2560, 32, 15, 5, 49280, 8192) | {"model_type": "llama", "head_dim": 64},
    },
    "HuggingFaceTB/SmolVLM-Instruct": {
        "model_type": "idefics3",
        "scale_factor": 3,
        "tie_word_embeddings": False,
        "vision_config": SIGLIP_SO400M_384,
        "text_config": _named(LANGUAGE, 2048, 8192, 24, 32, 32, 49155, 16384) | {"model_type": "llama", "head_dim": 64},
    },
    "Qwen/Qwen2-VL-2B-Instruct": {
        "model_type": "qwen2_vl",
        **_named(LANGUAGE, 1536, 8960, 28, 12, 2, 151936, 32768),
        "tie_word_embeddings": True,
        "vision_config": _named(QWEN_VISION, 32, 1536, 16, 3, 14, 2, 2) | {"embed_dim": 1280, "mlp_ratio": 4},
    },
    "Qwen/Qwen2.5-VL-3B-Instruct": {
        "model_type": "qwen2_5_vl",
        **_named(LANGUAGE, 2048, 11008, 36, 16, 2, 151936, 128000),
        "tie_word_embeddings": True,
        "vision_config": {
            **_named(QWEN_VISION, 32, 1280, 16, 3, 14, 2, 2),
            "intermediate_size": 3420,
            "out_hidden_size": 2048,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    },
    "microsoft/Phi-3.5-vision-instruct": {
        "model_type": "phi3_v",
        **_named(LANGUAGE, 3072, 8192, 32, 32, 32, 32064, 131072),
        "original_max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "pad_token_id": 32000,
        "img_processor": {"image_dim_out": 1024},
    },
}
MARK = "*"
NOT_TAKEN = "-"


def count_parameters(family: Family) -> dict[str, int]:
    """The number of parameters of each part: vision, connector, language (blocks and norms), embeddings.

    Embeddings are those of words, and the output layer if it has weights of its own.
    """
    outer = (family.model.get_input_embeddings(), family.model.get_output_embeddings())
    words = {id(p): p for module in outer for p in module.parameters()}
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
    lines = [
        "",
        f"GiB of memory that training takes on {device.type} in {dtype_name(dtype)}, with --batch-size "
        f"{settings.batch_size or 1}, one image a sample,",
        f"{texts.prefix} + {texts.question} + {texts.response} tokens of instructions, question and response, "
        f"{texts.classes} classes. Free now: {free / GIB:.1f} GiB; {MARK} does not fit.",
    ]
    if settings.image_size != AUTO:
        lines.append(f"{NOT_TAKEN}: does not take --image-size {settings.image_size}.")
    lines.append("Any other image-text-to-text model in the layout of transformers works too. More: docs/models.md.")
    print("\n".join(lines))


def model_table(settings: Settings, dtype: torch.dtype, device: str, free: int) -> str:
    """A row for each model: name, parameters, context in tokens, and the GiB that each tuning mode needs.

    Figures above `free` bytes are marked; a model that does not take the `--image-size` has none.
    """
    modes = [settings.with_tuning(mode) for mode in TUNING_DEFAULTS]
    rows = []
    for name, config in MODELS.items():
        family = outline(config)
        context = family.model.config.get_text_config().max_position_embeddings
        try:
            needs = [estimate(family, changed, dtype, device).total for changed in modes]
            cells = [f"{need / GIB:.1f} {MARK if need > free else ''}" for need in needs]
        except UsageError:
            cells = [NOT_TAKEN] * len(TUNING_DEFAULTS)
        rows.append([name, f"{sum(count_parameters(family).values()) / 1e6:,.0f}M", f"{context:,}", *cells])
    return format_table(rows, ["model", "parameters", "context", *(f"--tune {mode}" for mode in TUNING_DEFAULTS)])
