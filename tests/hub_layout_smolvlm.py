"""Small models with random weights under the file names, keys and geometry of SmolVLM-Instruct, all three sizes."""

import json
from pathlib import Path

import torch
from family_checks import randomize
from tiny import tiny_prompts

from vlm.families import build_model, build_processor

# What differs between the sizes and matters to this program: the geometry, and whether rows and columns have tokens of
# their own.
GEOMETRY = {
    "256M": {"image_size": 512, "patch_size": 16, "scale_factor": 4, "row_tokens": True},  # 64 image tokens
    "500M": {"image_size": 512, "patch_size": 16, "scale_factor": 4, "row_tokens": True},
    "2.2B": {"image_size": 384, "patch_size": 14, "scale_factor": 3, "row_tokens": False},  # 81
}
VISION = {"hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def save_published(folder: Path, size: str = "256M", **text) -> Path:
    """Write a model as on the hub: weights, config.json, and the processor in the files of transformers 4.

    Args:
        text: settings of the language model that replace those of TEXT.
    """
    geometry = dict(GEOMETRY[size])
    rows = (
        [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
        if geometry.pop("row_tokens")
        else []
    )
    prompts = tiny_prompts()
    processor = build_processor(
        **geometry, corpus=[prompts.system, prompts.question, *prompts.responses, "\n\n"]
    )  # the published one has this token
    processor.tokenizer.add_special_tokens({"additional_special_tokens": rows}, replace_extra_special_tokens=False)
    torch.manual_seed(0)
    model = build_model(processor, VISION, TEXT | {"max_position_embeddings": 8192} | text, **geometry)
    randomize(model, scale=0.2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "processor_config.json").unlink()  # transformers 5 keeps all in this one; the published files are three
    images = {
        "do_convert_rgb": True,
        "do_image_splitting": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "image_processor_type": "Idefics3ImageProcessor",
        "max_image_size": {"longest_edge": geometry["image_size"]},
        "processor_class": "Idefics3Processor",
        "resample": 1,
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": 4 * geometry["image_size"]},
    }
    _write(folder / "preprocessor_config.json", images)
    _write(
        folder / "processor_config.json",
        {"image_seq_len": processor.image_seq_len, "processor_class": "Idefics3Processor"},
    )
    template = folder / "chat_template.jinja"
    _write(folder / "chat_template.json", {"chat_template": template.read_text(encoding="utf-8")})
    template.unlink()
    return folder


def _write(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2), encoding="utf-8")
