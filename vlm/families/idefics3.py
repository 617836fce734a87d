"""Idefics3: SmolVLM-256M / 500M / 2.2B-Instruct and the demo's model."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig

from vlm.config.settings import ImageSize
from vlm.families.base import Family
from vlm.families.encoded import EncodedImages
from vlm.families.images.resizing import equals, one_tile
from vlm.families.images.sizes import pick_size
from vlm.families.processors import read_processor

PATCHES_AT_ONCE = (
    2048  # of the vision encoder on a CPU: 25 MB of its widest values, which memory that was used before has room for
)
PUBLISHED_TILES = 4  # the width to which images are enlarged before they are split, in tiles, in SmolVLM of every size


def _tile(config: PreTrainedConfig, image_size: ImageSize | None) -> int:
    """The edge of a tile in pixels."""
    vision = config.vision_config
    return pick_size(image_size, vision.patch_size * config.scale_factor, vision.image_size, Idefics3Family.title)


def _load_of(tile: int, config: PreTrainedConfig) -> tuple[int, int]:
    """Patches and tokens of one tile."""
    patches = (tile // config.vision_config.patch_size) ** 2
    return patches, patches // config.scale_factor**2


def by_processor(image_processor: Any, images: list[Image.Image]) -> dict[str, Any]:
    """What transformers gives of RGB images, one each sample."""
    return image_processor([[p] for p in images], return_tensors="pt", return_row_col_info=True)


class Idefics3Family(Family):
    model_types = ("idefics3",)
    title = "SmolVLM"
    image_defaults = {"image_splitting": False, "image_size": None}
    end_of_turn = "<end_of_utterance>"

    def __init__(self, model: nn.Module, processor: Any):
        super().__init__(model, processor)
        image_processor = processor.image_processor
        self.resizes_fast = not image_processor.do_image_splitting and equals(one_tile, by_processor, image_processor)

    @classmethod
    def load_processor(
        cls, folder: Path, image_splitting: bool | None = None, image_size: ImageSize | None = None
    ) -> Any:
        """The published processor, with one tile an image or, with `image_splitting`, as many as were published.

        The published default splits a 224 x 224 image into 17 tiles (1,088 tokens) where one tile has 64. Without
        splitting a `size` equal to the tile spares the enlargement to four tiles' width that comes before it. The tile
        may be smaller than published: the encoder's position embeddings are looked up by the place in the image, a
        fraction of its edge. All is saved with the processor.
        """
        processor = read_processor(folder)
        image_processor = processor.image_processor
        if image_splitting is not None:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            tile = _tile(config, image_size)
            processor.image_seq_len = _load_of(tile, config)[1]
            image_processor.do_image_splitting, image_processor.max_image_size = image_splitting, {"longest_edge": tile}
            if not image_splitting:
                image_processor.size = {"longest_edge": tile}
            elif image_processor.size["longest_edge"] <= tile:  # saved without splitting: back to what SmolVLM has
                image_processor.size = {"longest_edge": PUBLISHED_TILES * tile}
        return processor

    @property
    def vision(self) -> nn.Module:
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
        image_processor = self.processor.image_processor
        encode = one_tile if self.resizes_fast and not image_processor.do_image_splitting else by_processor
        batch = encode(image_processor, images)
        tiles = [
            max(1, rows[0] * columns[0] + (rows[0] > 0))
            for rows, columns in zip(batch["rows"], batch["cols"], strict=True)
        ]
        # (B, most tiles, 3, H, W) padded with empty tiles -> (all tiles, 3, H, W)
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
        # A patch counts where any of its pixels belongs to the image.
        patches = inputs["pixel_attention_mask"].unfold(1, size, size).unfold(2, size, size).any(-1).any(-1)
        pixels = inputs["pixel_values"].to(self.vision.dtype)
        count = len(pixels)
        if pixels.device.type == "cpu" and not torch.is_grad_enabled():
            count = max(1, PATCHES_AT_ONCE // patches[0].numel())
        pieces = zip(pixels.split(count), patches.split(count), strict=True)
        return torch.cat(
            [self.vision(pixel_values=some, patch_attention_mask=seen).last_hidden_state for some, seen in pieces]
        )
