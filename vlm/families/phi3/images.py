"""Phi-3.5-vision's images: one image -> tiles of 336 x 336 pixels and a global view; and its processor.

The partition into tiles is that of InternLM-XComposer2-4KHD (Dong et al. 2024, arXiv 2404.06512), as published with the
model.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from vlm.families.pretrained import load_pretrained
from vlm.families.processors import naming_the_file

TILE = 336  # pixels
TOKENS = 12  # of a tile, in each of its 12 lines
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SETTINGS = "preprocessor_config.json"
KEPT = (
    SETTINGS,
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "chat_template.json",
    "chat_template.jinja",
)
CODE = "microsoft/Phi-3.5-vision-instruct"  # where the published files have the code that they name


def fit_to_tiles(image: Image.Image, num_crops: int) -> Image.Image:
    """Enlarge or shrink an image to whole tiles, at most `num_crops`, and fill the rest with white.

    The longer side takes as many tiles as possible; the shorter one is filled equally on both sides.
    """
    portrait = image.height > image.width
    if portrait:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    ratio = image.width / image.height
    columns = max(s for s in range(1, num_crops + 1) if s * math.ceil(s / ratio) <= num_crops)
    width = columns * TILE
    height = max(1, int(width / ratio))
    resized = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    padded = Image.new("RGB", (width, math.ceil(height / TILE) * TILE), (255, 255, 255))
    padded.paste(resized, (0, (padded.height - height) // 2))
    return padded.transpose(Image.Transpose.TRANSPOSE) if portrait else padded


def count_tokens(rows: int, columns: int) -> int:
    """Tokens of an image of rows x columns tiles: theirs and the global view's, a newline after each line, one
    separator."""
    return (rows * columns + 1) * TOKENS**2 + (rows + 1) * TOKENS + 1


class Phi3VisionImages:
    """The image processor. Its settings are those in preprocessor_config.json, under their names."""

    def __init__(
        self, num_crops: int, image_mean: tuple[float, ...] = CLIP_MEAN, image_std: tuple[float, ...] = CLIP_STD
    ):
        self.num_crops = num_crops
        self.image_mean = image_mean
        self.image_std = image_std

    def __call__(self, images: list[Image.Image]) -> dict[str, Tensor]:
        """RGB images -> pixels and sizes.

        Returns:
            pixel_values: (all tiles, 3, 336, 336) float32; for each image the global view, then its tiles line by line.
            image_sizes: (B, 2) height and width in pixels.
        """
        tiles, sizes = [], []
        for image in images:
            pixels = self._normalized(fit_to_tiles(image, self.num_crops))
            height, width = pixels.shape[1:]
            # (3, height, width) -> (1, 3, 336, 336)
            overview = torch.nn.functional.interpolate(pixels.unsqueeze(0), size=(TILE, TILE), mode="bicubic")
            # (3, height, width) -> (3, rows, 336, columns, 336) -> (rows, columns, 3, 336, 336) -> (tiles, 3, 336, 336)
            cut = pixels.reshape(3, height // TILE, TILE, width // TILE, TILE).permute(1, 3, 0, 2, 4)
            tiles += [overview, cut.reshape(-1, 3, TILE, TILE)]
            sizes.append([height, width])
        return {"pixel_values": torch.cat(tiles), "image_sizes": torch.tensor(sizes)}

    def _normalized(self, image: Image.Image) -> Tensor:
        """(3, height, width) float32, with CLIP's mean and deviation."""
        # (height, width, 3) bytes -> (3, height, width) from 0 to 1
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
        return pixels.sub(torch.tensor(self.image_mean).view(3, 1, 1)).div(torch.tensor(self.image_std).view(3, 1, 1))


class Phi3VisionProcessor:
    """Tokenizer and image processor. The published files are kept as they are for other programs that read them."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, image_processor: Phi3VisionImages, files: dict[str, bytes]):
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.files = files

    @classmethod
    def from_folder(cls, folder: Path, num_crops: int | None = None) -> "Phi3VisionProcessor":
        """Read a folder. `num_crops` replaces the number in the folder, if given.

        Raises:
            UsageError: a file of it is missing or damaged.
        """
        with naming_the_file(folder):
            return cls._read(folder, num_crops)

    @classmethod
    def _read(cls, folder: Path, num_crops: int | None) -> "Phi3VisionProcessor":
        files = {name: (folder / name).read_bytes() for name in KEPT if (folder / name).is_file()}
        settings = json.loads(files.get(SETTINGS, b"{}"))
        images = Phi3VisionImages(
            num_crops or settings.get("num_crops", 1),
            tuple(settings.get("image_mean") or CLIP_MEAN),
            tuple(settings.get("image_std") or CLIP_STD),
        )
        # Only tokenizer.json is used: the class that tokenizer_config.json names would build its own pipeline from it.
        return cls(load_pretrained(PreTrainedTokenizerFast, folder), images, files)

    def save_pretrained(self, folder: Path) -> None:
        """Write the files that were read, with `num_crops` as it was used."""
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        settings = naming_its_code(json.loads(self.files.get(SETTINGS, b"{}")))
        settings |= {name: getattr(self.image_processor, name) for name in ("num_crops", "image_mean", "image_std")}
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def naming_its_code(settings: dict[str, Any]) -> dict[str, Any]:
    """A published JSON file that names where its code is, because no code is saved with a model here.

    `auto_map` holds `file.Class` for code in the model's own folder, and `owner/name--file.Class` for code in another
    repository.
    """
    places = settings.get("auto_map")
    if not places:
        return settings
    return settings | {
        "auto_map": {kind: place if "--" in place else f"{CODE}--{place}" for kind, place in places.items()}
    }
