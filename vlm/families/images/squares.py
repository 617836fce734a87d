"""Processors that make all images squares of one size, as most do: which size, and how to set another.

There are two ways to configure it: `size` with height and width (SigLIP, InternVL), or `size` with the shortest edge
and `crop_size` with the square that is cut out of the middle (CLIP, DINOv2).
"""

import copy
from typing import Any

from transformers import PreTrainedConfig


def first(value: Any) -> int:
    """One number for both edges, of a configuration that gives one or two equal ones."""
    return value[0] if isinstance(value, list | tuple) else value


def edge_of(images: Any) -> int | None:
    """Edge of the squares that an image processor makes, in pixels; None if it makes no squares of one size."""
    crop, size = (dict(getattr(images, name, None) or {}) for name in ("crop_size", "size"))
    size = crop if getattr(images, "do_center_crop", None) else size
    edge = size.get("height")
    return edge if edge == size.get("width") else None


def with_edge(processor: Any, edge: int, tokens: int) -> Any:
    """A copy of a processor that makes squares of another edge. The tokenizer is shared.

    A part that is cut out of the middle stays the same part.

    Args:
        edge: in pixels.
        tokens: image tokens of a square; only set if the processor does not count them from the pixels.
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
    """The edges of a patch and of an image token in pixels; they differ if a token is made of several patches."""
    patch = first(getattr(config.vision_config, "patch_size", 16))
    return patch, round(patch * getattr(config, "scale_factor", 1) / getattr(config, "downsample_ratio", 1))
