"""Qwen2-VL-Instruct and Qwen2.5-VL-Instruct of every size.

B = batch, L = tokens of a row, N = patches of all images, D = width. Four neighboring patches become one image token.
"""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index

from vlm.common import UsageError
from vlm.config import ImageSize
from vlm.families.base import Family
from vlm.families.encoded import EncodedImages
from vlm.families.processors import read_processor, without_videos

MIN_PIXELS = 4 * 28 * 28  # as published
MAX_PIXELS = 256 * 28 * 28  # 448 x 448: 256 image tokens, where the published 16384 * 28 * 28 runs out of memory
LONGEST_SHAPE = 200  # the processor refuses images whose sides differ by more than this factor


class PatchLinear(nn.Module):
    """The same as a Conv3d over patches of exactly its kernel's size, computed as a matrix product.

    The weight keeps its name and shape. Conv3d is several times slower (`benchmarks/patch_embed.py`).
    """

    def __init__(self, convolution: nn.Conv3d):
        super().__init__()
        self.weight = convolution.weight

    def forward(self, patches: Tensor) -> Tensor:
        """(N, channels, frames, height, width) -> (N, vision width)."""
        return nn.functional.linear(patches.flatten(1), self.weight.flatten(1))


def _most(max_pixels: int, image_size: ImageSize | None) -> int:
    """The most pixels of an image. Raises UsageError for an image size below that of one token."""
    if image_size is None or image_size.auto:
        return max_pixels
    if image_size.pixels < 28:
        raise UsageError(f"--image-size {image_size.pixels}: expected at least 28 pixels, the edge of one image token.")
    return image_size.pixels**2


class Qwen2VLFamily(Family):
    model_types = ("qwen2_vl",)
    title = "Qwen2-VL"
    image_defaults = {"min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS, "image_size": None}
    processor_class = without_videos(transformers.Qwen2VLProcessor)
    end_of_turn = "<|im_end|>"

    def __init__(self, model: Any, processor: Any):
        super().__init__(model, processor)
        patch_embed = model.model.visual.patch_embed
        patch_embed.proj = PatchLinear(patch_embed.proj)

    @classmethod
    def load_processor(
        cls,
        folder: Path,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        image_size: ImageSize | None = None,
    ) -> Any:
        """The published processor without its video half.

        An image is resized to multiples of 28 pixels with about the same shape, so that it has between `min_pixels` and
        `max_pixels`. With an exact `image_size` it has at most the pixels of a square with that edge. `auto` changes
        nothing, because images keep their size anyway.

        Raises:
            UsageError: `min_pixels` is more than `max_pixels`.
            UsageError: `image_size` is below the edge of one token, 28 pixels.
        """
        processor = read_processor(folder, cls.processor_class)
        processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
        saved = processor.image_processor.size
        least, most = min_pixels or saved["shortest_edge"], _most(max_pixels or saved["longest_edge"], image_size)
        if least > most:
            flag = f"--max-pixels {most}" if most == max_pixels else f"the {most} of --image-size"
            raise UsageError(f"--min-pixels {least} is more than {flag}: give both.")
        # transformers calls them edges, but they are numbers of pixels
        processor.image_processor.size = {"shortest_edge": least, "longest_edge": most}
        return processor

    def save(self, folder: Path, state: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Also write the published `preprocessor_config.json`.

        Older programs read it, and so does the video half of transformers' processor if torchvision is installed.
        """
        super().save(folder, state, dtype)
        image_processor = self.processor.image_processor
        image_processor.save_pretrained(folder)
        file = folder / "preprocessor_config.json"
        config = json.loads(file.read_text(encoding="utf-8")) | {
            "min_pixels": image_processor.size["shortest_edge"],
            "max_pixels": image_processor.size["longest_edge"],
            "processor_class": self.processor_class.__name__,
        }
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    # The parts. transformers keeps the connector, which it calls merger, inside the vision encoder.

    @property
    def vision(self) -> nn.Module:
        visual = self.model.model.visual
        return nn.ModuleList([visual.patch_embed, visual.rotary_pos_emb, visual.blocks])

    @property
    def connector(self) -> nn.Module:
        return self.model.model.visual.merger

    @property
    def language(self) -> nn.Module:
        return self.model.model.language_model

    @property
    def stop_ids(self) -> list[int]:
        return self.tokenizer.convert_tokens_to_ids([self.end_of_turn, "<|endoftext|>"])

    # Images

    def size_text(self, wish: ImageSize) -> str:
        most = self.processor.image_processor.size["longest_edge"]
        tokens = most // (self.processor.image_processor.patch_size * self.processor.image_processor.merge_size) ** 2
        return f"that of the images, at most {most:,} pixels: up to {tokens} image tokens."

    def image_load(
        self, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS, image_size: ImageSize | None = None
    ) -> tuple[int, int]:
        vision = self.model.config.vision_config
        patches = max(min_pixels, _most(max_pixels, image_size)) // vision.patch_size**2
        return patches, patches // vision.spatial_merge_size**2

    def refusal(self, image: Image.Image) -> str | None:
        return self.refusal_of_size(*image.size) or super().refusal(image)

    def refusal_of_size(self, width: int, height: int) -> str | None:
        if max(width, height) <= LONGEST_SHAPE * min(width, height):
            return None
        most = f"at most {LONGEST_SHAPE} times as long as wide"
        return f"{width} x {height} pixels, but {self.title} takes images {most}: crop it"

    def encode_images(self, images: list[Image.Image]) -> EncodedImages:
        """RGB images -> patches of all images, (N, values of a patch), and grids, (B, 3) frames, rows and columns."""
        image_processor = self.processor.image_processor
        batch = image_processor(images, return_tensors="pt")
        # (B, 3) grids of patches -> (B,) image tokens: merge_size x merge_size patches become one
        counts = batch["image_grid_thw"].prod(1) // image_processor.merge_size**2
        return EncodedImages(dict(batch), [[self.image_token_id] * count for count in counts.tolist()])

    def vision_features(self, inputs: dict[str, Tensor]) -> Tensor:
        """(N, vision width), the four patches of a token next to each other.

        The forward runs the merger too, and its result is dropped: about 1/70 of the vision encoder's work.
        """
        return self.model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).last_hidden_state

    # Positions: three of each token, time, row and column (M-RoPE, Wang et al. 2024, arXiv 2409.12191, section 2.1)

    def positions(
        self, start: int, input_ids: Tensor, lengths: Tensor, inputs: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Positions of rows that begin with an image, as in `Family.positions`.

        The tokens of the image all have the time `start`, and count rows and columns from there. The text continues
        after the larger of rows and columns, as if the image were that many tokens long.

        Returns:
            positions: (3, B, L) time, row and column of each token.
            ends: (B,) the position of the first token after each row.
        """
        if not inputs:
            return super().positions(start, input_ids, lengths, inputs)
        # (B, 3) patches -> rows and columns of image tokens, (B, 1) each
        grid = inputs["image_grid_thw"] // self.processor.image_processor.merge_size
        rows, columns = grid[:, 1:2], grid[:, 2:3]
        count, extent = rows * columns, torch.maximum(rows, columns)
        # (1, L) places in the row -> (B, L) positions as text, (3, B, L) positions as image tokens
        places = torch.arange(input_ids.shape[1], device=grid.device).unsqueeze(0)
        text = places - count + extent
        inside = torch.stack([torch.zeros_like(text), places // columns, places % columns])
        return start + torch.where(places < count, inside, text), start + lengths + (extent - count).squeeze(1)


class Qwen25VLFamily(Qwen2VLFamily):
    model_types = ("qwen2_5_vl",)
    title = "Qwen2.5-VL"
    processor_class = without_videos(transformers.Qwen2_5_VLProcessor)

    def vision_features(self, inputs: dict[str, Tensor]) -> Tensor:
        """(N, vision width) in the order of the image; the vision encoder itself sorts tokens by attention window."""
        hidden = super().vision_features(inputs)
        visual = self.model.model.visual
        order, _ = get_vision_window_index(
            inputs["image_grid_thw"],
            visual.spatial_merge_size,
            window_size=visual.window_size,
            patch_size=visual.patch_size,
        )
        # (N, width) -> (tokens, patches of a token, width): tokens change places -> (N, width)
        tokens = hidden.unflatten(0, (-1, visual.spatial_merge_unit))
        return tokens[order.argsort().to(hidden.device)].flatten(0, 1)
