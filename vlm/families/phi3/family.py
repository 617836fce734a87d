"""Phi-3.5-vision-instruct, with the model in model.py: no code of the published folder is run.

B = batch, L = tokens of a row, T = tiles of all images, N = image tokens of all images, D = width.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

import vlm.families.phi3.model  # noqa: F401 (makes the model known to transformers)
from vlm.common import UsageError, dtype_name
from vlm.config import ImageSize
from vlm.conversation import Prompts, Rendered
from vlm.families.base import Family
from vlm.families.encoded import EncodedImages
from vlm.families.phi3.images import TILE, Phi3VisionProcessor, count_tokens, naming_its_code
from vlm.families.processors import chat_text, drops_texts
from vlm.families.texts import check_rendering, check_texts

IMAGE = "<|image_1|>"  # the image in the text
IMAGES = re.compile(r"<\|image_\d+\|>")
PLACEHOLDER = "<|image|>"  # a token that the published processor reserves for images, and never writes
WORDS = "model.embed_tokens.weight"
WORDS_AGAIN = "model.vision_embed_tokens.wte.weight"  # the published files have both, and some programs want both
ROOM_TO_WRITE = 64  # tokens; what `VLMClassifier.write` allows at least


def _check_size(image_size: ImageSize | None) -> None:
    """Raises UsageError for any size but that of the tiles."""
    if image_size and not image_size.auto and image_size.pixels != TILE:
        raise UsageError(
            f"--image-size {image_size.pixels}: {Phi3VisionFamily.title} is fixed to tiles of {TILE} pixels. Leave it "
            "out; --num-crops says how many tiles."
        )


class Part(nn.Module):
    """Some parts of a module, with one of its methods as the forward. The parts still belong to the module.

    The published layout has in one module what are two parts of a `Family`.
    """

    def __init__(self, owner: nn.Module, names: Iterable[str], run: Callable[..., Any]):
        super().__init__()
        for name in names:
            setattr(self, name, getattr(owner, name))
        self.run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


class Phi3VisionFamily(Family):
    model_types = ("phi3_v",)
    title = "Phi-3.5-vision"
    image_defaults = {"num_crops": 1, "image_size": None}  # 313 tokens an image, where the published 4 takes up to 781
    image_token = IMAGE
    end_of_turn = "<|end|>"

    def __init__(self, model: Any, processor: Phi3VisionProcessor):
        super().__init__(model, processor)
        known = self.tokenizer.convert_tokens_to_ids(PLACEHOLDER)
        # Without the reserved token it is the last row of the embedding: the vocabulary is padded, so no text has it.
        self.placeholder_id = model.config.vocab_size - 1 if known in (None, self.tokenizer.unk_token_id) else known
        self.published: dict[str, dict[str, Any]] = {}  # configuration files as they were read

    # Loading

    @classmethod
    def load(
        cls, folder: Path, dtype: torch.dtype, device: torch.device, bits: int | None = None, **images: Any
    ) -> Self:
        family = super().load(folder, dtype, device, bits, **images)
        family.published = {
            name: json.loads((folder / name).read_text(encoding="utf-8"))
            for name in ("config.json", "generation_config.json")
            if (folder / name).is_file()
        }
        return family

    @classmethod
    def load_processor(
        cls, folder: Path, num_crops: int | None = None, image_size: ImageSize | None = None
    ) -> Phi3VisionProcessor:
        """Tokenizer and image processor as published. An image has at most `num_crops` tiles, and its global view.

        Raises:
            UsageError: `image_size` is not that of a tile.
        """
        _check_size(image_size)
        return Phi3VisionProcessor.from_folder(folder, num_crops)

    def save(self, folder: Path, state: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Write the published layout: names of the weights, configuration, tokenizer, image settings."""
        super().save(folder, state | {WORDS_AGAIN: state[WORDS].to("cpu", copy=True)}, dtype)
        for name, content in self.published.items():
            if name == "config.json":
                content = naming_its_code(content) | {"torch_dtype": dtype_name(dtype)}
                content.pop("_attn_implementation", None)  # of the published model: asks for one kind of GPU
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def plain_prompt(self, prompts: Prompts) -> None:
        return None

    # The parts. The published layout has vision encoder and connector in one module, inside the language model.

    @property
    def vision(self) -> PreTrainedModel:
        return self.model.model.vision_embed_tokens.img_processor

    @property
    def connector(self) -> nn.Module:
        embedding = self.model.model.vision_embed_tokens
        return Part(embedding, ("img_projection", "glb_GN", "sub_GN"), embedding.project)

    @property
    def language(self) -> nn.Module:
        model = self.model.model
        return Part(model, [name for name, _ in model.named_children() if name != "vision_embed_tokens"], model.forward)

    # Text

    @property
    def image_token_id(self) -> int:
        return self.placeholder_id

    def placeholders_in(self, text: str) -> list[str]:
        return [*IMAGES.findall(text), *([PLACEHOLDER] if PLACEHOLDER in text else [])]

    @property
    def stop_ids(self) -> list[int]:
        return self.tokenizer.convert_tokens_to_ids([self.end_of_turn, "<|endoftext|>"])

    @property
    def switch_length(self) -> int | None:
        """Tokens up to which positions take the short factors (LongRoPE, Ding et al. 2024, arXiv 2402.13753); None if
        there is one set of factors."""
        rope = self.model.config.rope_parameters
        return rope["original_max_position_embeddings"] if rope["rope_type"] == "longrope" else None

    @property
    def max_length(self) -> int:
        """As many tokens as take the short factors, 4,096.

        In a longer row all positions take the long factors, also those of the prefix. But a prefix that was run once
        has the short ones.
        """
        config = self.model.config
        return min(config.max_position_embeddings, config.sliding_window or math.inf, self.switch_length or math.inf)

    def render(self, prompts: Prompts) -> Rendered:
        """As published: the texts before and after the image are tokenized one by one, each with a beginning-of-text
        token.

        Raises:
            UsageError: a text contains a control token, or the chat template is not that of the model.
        """
        check_texts(self, prompts)
        opening = self.apply_template(prompts.messages(), add_generation_prompt=True)
        pieces = IMAGES.split(opening)
        if len(pieces) != 2 or any(text not in opening for text in (prompts.system, prompts.question)):
            raise drops_texts(self.tokenizer)
        check_rendering(self, prompts)
        rendered = self.rendered(prompts, self.tokenize(pieces[0]), self.tokenize(pieces[1]))
        # Room for what is written later, so that no row grows past the switch of the positions.
        room = max(ROOM_TO_WRITE, 2 * max(map(len, rendered.response_ids)), 2 * prompts.reasoning_tokens)
        return replace(rendered, max_length=self.max_length - room)

    def response_ids(self, prompts: Prompts, text: str) -> list[int]:
        """Tokenized together with the question before it, because its first token may depend on it."""
        question = IMAGES.split(self.apply_template(prompts.messages(), add_generation_prompt=True))[1]
        ids = self.tokenize(question + self.turn(prompts, text))
        return ids[len(self.tokenize(question)) :]

    def apply_template(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        """The published template takes plain text, in which an image is a placeholder in a line of its own."""
        plain = []
        for message in messages:
            parts = [f"{IMAGE}\n" if part["type"] == "image" else part["text"] for part in message["content"]]
            plain.append({**message, "content": "".join(parts)})
        return chat_text(self.tokenizer, plain, add_generation_prompt)

    def tokenize(self, text: str) -> list[int]:
        return [self.tokenizer.bos_token_id, *super().tokenize(text)]

    # Images

    def size_text(self, wish: ImageSize) -> str:
        crops = self.processor.image_processor.num_crops
        _, tokens = self.image_load(num_crops=crops)
        return f"{TILE} px, to which {self.title} is fixed, with --num-crops {crops}: up to {tokens} image tokens."

    def image_load(self, num_crops: int = 1, image_size: ImageSize | None = None) -> tuple[int, int]:
        _check_size(image_size)
        vision = self.model.config.clip()
        patches = (1 + num_crops) * (vision.image_size // vision.patch_size) ** 2
        return patches, max(count_tokens(rows, num_crops // rows) for rows in range(1, num_crops + 1))

    def encode_images(self, images: list[Image.Image]) -> EncodedImages:
        inputs = self.processor.image_processor(images)
        counts = [count_tokens(rows, columns) for rows, columns in (inputs["image_sizes"] // TILE).tolist()]
        return EncodedImages(inputs, [[self.placeholder_id] * count for count in counts])

    def vision_features(self, inputs: dict[str, Tensor]) -> Tensor:
        """(T, 3, 336, 336) pixels -> (T, patches, vision width)."""
        pixels = inputs["pixel_values"].to(self.vision.dtype)
        return self.model.model.vision_embed_tokens.patches(pixels)

    def shares(self, inputs: dict[str, Tensor], tokens: Sequence[int]) -> list[int]:
        """The tiles of each image, and one more for the whole of it."""
        return ((inputs["image_sizes"] // TILE).prod(1) + 1).tolist()

    def connect(self, hidden: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """(T, patches, vision width) -> (N, D), with newlines and separators between the tokens of the tiles."""
        return self.connector(hidden, (inputs["image_sizes"] // TILE).tolist())

    # The language model

    def new_cache(self) -> Cache:
        return DynamicCache()  # without the sliding window of the configuration, which is longer than any row

    def run_language(
        self, embeddings: Tensor, positions: Tensor, cache: Cache | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """As in any family, up to the switch of the positions.

        Raises:
            UsageError: a text grows past the switch. The tokens before it would need other positions than they have in
                the cache.
        """
        keys = embeddings.shape[1] + (cache.get_seq_length() if cache is not None else 0)
        limit = self.switch_length or math.inf
        # Reading the positions makes a GPU wait, so they are read only if the row may be too long.
        if keys > limit and int(positions.max()) >= limit:
            raise UsageError(
                f"the text would grow longer than {limit} tokens, where this model's positions change: "
                "write a shorter text."
            )
        return super().run_language(embeddings, positions, cache, mask)
