"""RGB images -> pixels by PIL and torch alone: the same numbers as transformers' image processors, several times
faster.

The processors turn an image into an array and back for each resize, and do the arithmetic of a few hundred thousand
numbers in numpy, partly in float64. What PIL resizes here and there is the same to the bit; what follows differs by
float32 rounding. A family asks `equals` at load whether that holds for its processor with its settings, and else leaves
the work to the processor; loader processes inherit the answer with the family.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

TOLERANCE = 1e-5  # of normalized pixels
NOISE_SIZES = ((40, 30), (31, 90), (640, 400))  # width and height of the images that are compared

Encode = Callable[[Any, list[Image.Image]], dict[str, Any]]


def normalized(image: Image.Image, image_processor: Any) -> Tensor:
    """(3, height, width) float32, as the settings of an image processor say."""
    mean, std = (
        torch.tensor(image_processor.image_mean).view(3, 1, 1),
        torch.tensor(image_processor.image_std).view(3, 1, 1),
    )
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format)
    return pixels.mul_(image_processor.rescale_factor / std).sub_(mean / std)


def one_tile(image_processor: Any, images: list[Image.Image]) -> dict[str, Any]:
    """What an Idefics3 image processor gives of images that are not split, each given as one sample.

    Returns:
        pixel_values: (B, 1, 3, edge, edge). pixel_attention_mask: (B, 1, edge, edge). rows, cols: 0 each.
    """
    edge = image_processor.max_image_size["longest_edge"]
    pixels = torch.empty(len(images), 1, 3, edge, edge)
    for i, image in enumerate(images):
        # First to its own shape and then to a square: twice, as the processor does.
        shaped = image.resize(_longest_edge(image.size, image_processor.size["longest_edge"]), image_processor.resample)
        pixels[i, 0] = normalized(shaped.resize((edge, edge), image_processor.resample), image_processor)
    mask, none = torch.ones(len(images), 1, edge, edge, dtype=torch.long), [[0]] * len(images)
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "rows": none, "cols": none}


def _longest_edge(size: tuple[int, int], edge: int) -> tuple[int, int]:
    """Width and height with the longest edge at `edge`, and the other one even."""
    width, height = size
    ratio = width / height
    if width >= height:
        short = int(edge / ratio)
        return edge, max(short + short % 2, 1)
    short = int(edge * ratio)
    return max(short + short % 2, 1), edge


def native_patches(image_processor: Any, images: list[Image.Image]) -> dict[str, Any]:
    """What a Qwen2-VL image processor gives.

    Returns:
        pixel_values: (patches of all images, 3 * frames * patch * patch). image_grid_thw: (B, 3).
    """
    patch, merge, frames = image_processor.patch_size, image_processor.merge_size, image_processor.temporal_patch_size
    parts, grids = [], []
    for image in images:
        least, most = image_processor.size["shortest_edge"], image_processor.size["longest_edge"]
        height, width = smart_resize(image.height, image.width, patch * merge, min_pixels=least, max_pixels=most)
        pixels = normalized(image.resize((width, height), image_processor.resample), image_processor)
        rows, columns = height // patch, width // patch
        # (3, rows, patch, columns, patch), the rows and columns of a token apart -> tokens, their patches, 3, patch,
        # patch
        cut = pixels.view(3, rows // merge, merge, patch, columns // merge, merge, patch).permute(1, 4, 2, 5, 0, 3, 6)
        still = cut.unsqueeze(5).expand(*cut.shape[:5], frames, patch, patch)
        parts.append(still.reshape(rows * columns, -1))
        grids.append([1, rows, columns])
    return {"pixel_values": torch.cat(parts), "image_grid_thw": torch.tensor(grids)}


def equals(fast: Encode, slow: Encode, image_processor: Any) -> bool:
    """Whether two ways of encoding give the same on images of noise: tensors within 1e-5, of the same types, and all
    else equal."""
    images = [Image.effect_noise(size, 80).convert("RGB") for size in NOISE_SIZES]
    try:
        ours, theirs = fast(image_processor, images), slow(image_processor, images)
        return ours.keys() == dict(theirs).keys() and all(_same(ours[name], theirs[name]) for name in ours)
    except Exception:  # settings that only the processor knows what to do with
        return False


def _same(ours: Any, theirs: Any) -> bool:
    if not isinstance(ours, Tensor):
        return ours == theirs
    return (
        ours.shape == theirs.shape and ours.dtype == theirs.dtype and bool(((ours - theirs).abs() <= TOLERANCE).all())
    )
