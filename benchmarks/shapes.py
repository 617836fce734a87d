"""The shapes of the models that are measured: the published ones, and smaller ones for everyday use and for tests."""

from dataclasses import dataclass
from typing import Any

import common  # noqa: F401, first: it finds the program

from vlm.machine import MODELS

PUBLISHED = {  # what `options.shape` may be
    "256M": "HuggingFaceTB/SmolVLM-256M-Instruct",
    "500M": "HuggingFaceTB/SmolVLM-500M-Instruct",
    "2.2B": "HuggingFaceTB/SmolVLM-Instruct",
}
TINY_LAYERS = (2, 1)  # of language model and vision encoder
TINY_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
TINY_TEXT = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1200,
    "head_dim": 12,
}


@dataclass(frozen=True)
class Shape:
    """vision, text: as in a config.json. image, patch: their edges in pixels. scale: patches of an edge that become one
    token's."""

    vision: dict[str, Any]
    text: dict[str, Any]
    image: int
    patch: int
    scale: int


def shape(name: str = "256M", size: str = "full", layers: tuple[int, int] | None = None) -> Shape:
    """A published shape as it is, with a sixth of its layers (quick), or with next to nothing of it but patch and scale
    (tiny).

    Args:
        layers: of language model and vision encoder, where they should be others.
    """
    published = MODELS[PUBLISHED[name]]
    vision, text = dict(published["vision_config"]), dict(published["text_config"])
    image, patch, scale = vision.pop("image_size"), vision.pop("patch_size"), published["scale_factor"]
    del text["model_type"]
    whole = text["num_hidden_layers"], vision["num_hidden_layers"]
    if size == "tiny":
        vision, text, image = vision | TINY_VISION, text | TINY_TEXT, patch * scale  # one token an image
    smaller = {"full": whole, "quick": tuple(count // 6 for count in whole), "tiny": TINY_LAYERS}
    text["num_hidden_layers"], vision["num_hidden_layers"] = layers or smaller[size]
    return Shape(vision, text, image, patch, scale)
