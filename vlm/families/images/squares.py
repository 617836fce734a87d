"""Processors that make squares of one size of all images, as most do: which size, and how to set another.

Known are two ways of saying it: `size` with height and width (SigLIP, InternVL), and `size` with the shortest edge and
`crop_size` with the square that is cut out of the middle (CLIP, DINOv2).
"""

import copy
from typing import Any

from transformers import PreTrainedConfig


def first(value: Any) -> int:
    """Some configurations give one number for both edges, and some two that are equal."""
    return value[0] if isinstance(value, list | tuple) else value


def edge_of(images: Any) -> int | None:
    """Edge of the squares that an image processor makes, in pixels; None where it makes no squares of one size."""
    crop, size = (dict(getattr(images, name, None) or {}) for name in ("crop_size", "size"))
    size = crop if getattr(images, "do_center_crop", None) else size
    edge = size.get("height")
    return edge if edge == size.get("width") else None


def with_edge(processor: Any, edge: int, tokens: int) -> Any:
    """The processor as one that makes squares of another edge, which become so many tokens; the tokenizer is shared.

    A part that is cut out of the middle stays the same part. Where a processor counts the tokens by itself, from the
    pixels, it keeps no number of them.
    """
    resized = copy.copy(processor)
    images = resized.image_processor = copy.deepcopy(processor.image_processor)
    before = edge_of(images)
    images.size = {name: round(pixels * edge / before) for name, pixels in dict(images.size).items() if pixels}
    if getattr(images, "do_center_crop", None):
        images.crop_size = {"height": edge, "width": edge}
    if hasattr(resized, "image_seq_length"):
        resized.image_seq_length = tokens
    return resized


def patch_and_unit(config: PreTrainedConfig) -> tuple[int, int]:
    """Pixels in a line of a patch, and of an image token, of several patches where the model puts neighbors
    together."""
    patch = first(getattr(config.vision_config, "patch_size", 16))
    return patch, round(patch * getattr(config, "scale_factor", 1) / getattr(config, "downsample_ratio", 1))
