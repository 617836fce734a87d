"""Idefics3: SmolVLM-256M / 500M / 2.2B-Instruct and the demo's model."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from vlm.config import ImageSize
from vlm.families.base import Family
from vlm.families.configuration import build_config, read_config
from vlm.families.encoded import EncodedImages
from vlm.families.images.sizes import pick_size
from vlm.families.processors import read_processor

# Of the vision encoder on a CPU: their widest activations take 25 MB, which fits into memory that was used before.
PATCHES_AT_ONCE = 2048
PUBLISHED_TILES = 4  # SmolVLM of every size enlarges an image to the width of so many tiles before it is split


def _tile(config: PreTrainedConfig, image_size: ImageSize | None) -> int:
    """The edge of a tile in pixels."""
    vision = config.vision_config
    return pick_size(image_size, vision.patch_size * config.scale_factor, vision.image_size, Idefics3Family.title)


def _load_of(tile: int, config: PreTrainedConfig) -> tuple[int, int]:
    """Patches and tokens of one tile."""
    patches = (tile // config.vision_config.patch_size) ** 2
    return patches, patches // config.scale_factor**2


class Idefics3Family(Family):
    model_types = ("idefics3",)
    title = "SmolVLM"
    image_defaults = {"image_splitting": False, "image_size": None}
    end_of_turn = "<end_of_utterance>"

    @classmethod
    def load_processor(
        cls, folder: Path, image_splitting: bool | None = None, image_size: ImageSize | None = None
    ) -> Any:
        """The published processor, with one tile for each image or, with `image_splitting`, as many as published.

        The published default splits a 224 x 224 image into 17 tiles (1,088 tokens); one tile has 64 tokens. Without
        splitting, `size` is that of the tile, so an image is resized once and not first enlarged to four tiles' width.
        A tile may be smaller than published, because position embeddings are looked up by the relative place in the
        image. All of it is saved with the processor.
        """
        processor = read_processor(folder)
        image_processor = processor.image_processor
        if image_splitting is None:
            return processor
        config = build_config(read_config(folder), folder / "config.json")
        tile = _tile(config, image_size)
        _, processor.image_seq_len = _load_of(tile, config)
        image_processor.do_image_splitting = image_splitting
        image_processor.max_image_size = {"longest_edge": tile}
        if not image_splitting:
            image_processor.size = {"longest_edge": tile}
        elif image_processor.size["longest_edge"] <= tile:  # saved without splitting: back to the published size
            image_processor.size = {"longest_edge": PUBLISHED_TILES * tile}
        return processor

    @property
    def vision(self) -> PreTrainedModel:
        return self.model.model.vision_model

    @property
    def connector(self) -> nn.Module:
        return self.model.model.connector

    @property
    def language(self) -> nn.Module:
        return self.model.model.text_model

    @property
    def edges(self) -> tuple[int, int]:
        return self.processor.image_processor.max_image_size["longest_edge"], self.model.config.vision_config.image_size

    def image_load(self, image_splitting: bool = False, image_size: ImageSize | None = None) -> tuple[int, int]:
        tiles = PUBLISHED_TILES**2 + 1 if image_splitting else 1
        patches, tokens = _load_of(_tile(self.model.config, image_size), self.model.config)
        return tiles * patches, tiles * tokens

    def encode_images(self, images: list[Image.Image]) -> EncodedImages:
        """RGB images -> tiles of all images, (tiles, 3, H, W), and which of their pixels belong to an image."""
        batch = self.processor.image_processor(
            [[image] for image in images], return_tensors="pt", return_row_col_info=True
        )
        # An image that was split has rows x columns tiles and the whole image; any other is one tile.
        tiles = [
            max(1, rows[0] * columns[0] + (rows[0] > 0))
            for rows, columns in zip(batch["rows"], batch["cols"], strict=True)
        ]
        # (B, most tiles, 3, H, W) padded with empty tiles -> (all tiles, 3, H, W); masks likewise without the 3
        inputs = {
            name: torch.cat([tensor[i, :count] for i, count in enumerate(tiles)])
            for name, tensor in batch.items()
            if name in ("pixel_values", "pixel_attention_mask")
        }
        texts = [self.processor.replace_image_token(batch, i) for i in range(len(images))]
        return EncodedImages(inputs, [self.tokenize(text) for text in texts])

    def vision_features(self, inputs: dict[str, Tensor]) -> Tensor:
        """(tiles, patches, vision width)."""
        size = self.model.config.vision_config.patch_size
        # (tiles, H, W) -> (tiles, rows, columns): a patch counts if any of its pixels belongs to the image
        patches = inputs["pixel_attention_mask"].unfold(1, size, size).unfold(2, size, size).any(-1).any(-1)
        pixels = inputs["pixel_values"].to(self.vision.dtype)
        count = len(pixels)
        if pixels.device.type == "cpu" and not torch.is_grad_enabled():
            count = max(1, PATCHES_AT_ONCE // patches[0].numel())
        # (tiles, 3, H, W) -> (tiles, patches, vision width), `count` tiles at a time
        pieces = zip(pixels.split(count), patches.split(count), strict=True)
        return torch.cat(
            [self.vision(pixel_values=some, patch_attention_mask=seen).last_hidden_state for some, seen in pieces]
        )
