"""Any other image-text-to-text model that transformers knows, driven by its processor and chat template.

Only `forward` is assumed of a model. If it has a language model that takes embeddings and a cache, the shared prefix is
used, after a check against the plain forward at the start of a run. Else everything goes through the plain forward.

B = batch, K = tokens of a whole sequence, D = width, V = vocabulary.
"""

import inspect
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor, nn

from vlm.common import UsageError, note
from vlm.config import ImageSize
from vlm.conversation import Prompts, Rendered
from vlm.families.base import Family
from vlm.families.encoded import CONNECTED_FEATURES, ENCODER_FEATURES, EncodedImages
from vlm.families.images import squares
from vlm.families.images.sizes import pick_size
from vlm.families.layout import Layout, lay_out_conversation
from vlm.families.processors import processor_class_of, read_processor
from vlm.families.texts import check_texts

TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels")
VISION_NAMES = ("vision_tower", "vision_model", "visual", "vision_encoder", "image_tower")
# Their image tokens, or the whole prompt, see each other in both directions. The check may miss it on a small model.
BIDIRECTIONAL = ("gemma3", "gemma4", "paligemma")
PROBE_SIZE = (64, 48)  # pixels of the image that shows where a processor puts its tokens


class _Reached(Exception):
    """Ends a forward pass where the vision encoder has done its work."""


class GenericFamily(Family):
    """A model that is driven through its processor. The check at the start of a run may switch off `shares_prefix`."""

    title = "this model"
    image_defaults = {"image_size": None}
    must_be_checked = True
    _published_edge: int | None = None  # of the processor, before another size was set
    _layout: Layout  # of the conversation, set by `render` like the token ids before and after the image
    _prefix: list[int]
    _question: list[int]

    def __init__(self, model: Any, processor: Any):
        super().__init__(model, processor)
        if model.config.model_type in BIDIRECTIONAL:
            note(
                f"{model.config.model_type} reads images in both directions, so no prefix can be shared: "
                "training takes the plain forward."
            )
            self.shares_prefix = False

    @classmethod
    def load(
        cls, folder: Path, dtype: torch.dtype, device: torch.device, bits: int | None = None, **images: Any
    ) -> Self:
        family = super().load(folder, dtype, device, bits)
        family._published_edge = squares.edge_of(family.processor.image_processor)
        if images.get("image_size") is not None:
            family._set_size(images["image_size"])
        return family

    @classmethod
    def load_processor(cls, folder: Path, *args: Any, **images: Any) -> Any:
        return read_processor(folder, processor_class_of(folder))

    # The parts

    @property
    def body(self) -> Any:
        """The module with vision, connector and language as its children."""
        return getattr(self.model, "model", self.model)

    @property
    def vision(self) -> nn.Module:
        return next((getattr(self.body, name) for name in VISION_NAMES if hasattr(self.body, name)), nn.ModuleList())

    @property
    def language(self) -> nn.Module:
        return getattr(self.body, "language_model", None) or self.model.get_decoder()

    @property
    def connector(self) -> nn.ModuleList:
        """Everything that is neither vision nor language."""
        return nn.ModuleList(
            child for child in self.body.children() if child is not self.vision and child is not self.language
        )

    # Text

    @cached_property
    def image_token_id(self) -> int:
        """Cached for loader processes, which have no model."""
        config = self.model.config
        for name in ("image_token_id", "image_token_index"):
            if getattr(config, name, None) is not None:
                return getattr(config, name)
        raise UsageError(
            f"a model of type {config.model_type} names no image token in its config.json: choose another model."
        )

    @property
    def stop_ids(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else list(ends or [])
        return list(dict.fromkeys([self._closing_ids[-1], *ends]))

    @property
    def _closing_ids(self) -> list[int]:
        """The tokens that end the model's turn."""
        return self.tokenize(self._layout.closing) or [self.tokenizer.eos_token_id]

    @property
    def _placeholder(self) -> str:
        """What a chat template writes for an image, before the processor puts in its tokens."""
        names = ("boi_token", "image_token")
        return next((token for name in names if (token := getattr(self.processor, name, None))), "<image>")

    def placeholders_in(self, text: str) -> list[str]:
        known = {self._placeholder, getattr(self.processor, "image_token", None) or self._placeholder}
        return [placeholder for placeholder in sorted(known) if placeholder in text]

    @property
    def image_token(self) -> str:
        """How the image token is written."""
        return self.tokenizer.convert_ids_to_tokens(self.image_token_id) or self._placeholder

    def render(self, prompts: Prompts) -> Rendered:
        """Have the processor lay out a conversation with an image, and see which tokens come before and after it.

        Raises:
            UsageError: a text contains a control token.
            UsageError: the chat template or the processor drops a part of the conversation.
        """
        check_texts(self, prompts)
        self._layout = lay_out_conversation(self.processor, prompts, self._placeholder)
        (ids,), _ = self._whole_ids([Image.new("RGB", PROBE_SIZE)])
        places = [i for i, token in enumerate(ids) if token == self.image_token_id]
        if not places:
            raise UsageError(
                "the processor puts no image token into the conversation, so the model would learn from the text only: "
                "choose another model."
            )
        self._prefix = ids[: places[0]] if self.shares_prefix else []
        self._question = ids[places[-1] + 1 :]
        return self.rendered(prompts, self._prefix, self._question)

    def response_ids(self, prompts: Prompts, text: str) -> list[int]:
        """As it is tokenized after the question, and the end of the turn."""
        tail, text = self._layout.opening[-20:], self._layout.before + text
        alone, together = self.tokenize(tail), self.tokenize(tail + text)
        ids = together[len(alone) :] if together[: len(alone)] == alone else self.tokenize(text)
        return ids + self._closing_ids

    def plain_prompt(self, prompts: Prompts) -> dict[str, Any]:
        """As in `Family`, once `render` has laid out the conversation."""
        return {"text": self._layout.opening, "special_tokens": not self._begins(self._layout.opening)}

    def _begins(self, opening: str) -> bool:
        """Whether a text has the token already that begins one."""
        return self.tokenizer.bos_token is not None and opening.startswith(self.tokenizer.bos_token)

    # Images

    @property
    def edges(self) -> tuple[int, int] | None:
        edge = squares.edge_of(self.processor.image_processor)
        return (edge, self._published_edge) if edge and self._published_edge else None

    def size_text(self, wish: ImageSize) -> str:
        return super().size_text(wish) if self.edges else "as the model's processor makes it."

    def _set_size(self, wish: ImageSize) -> None:
        """Have the processor make images of another size, if the vision encoder takes them. Tried on an image.

        Raises:
            UsageError: an exact size does not work. (auto keeps the published size.)
        """
        published = self._published_edge
        if published is None:
            if wish.auto:
                return
            raise UsageError(
                f"--image-size {wish.pixels}: the processor of this model makes images of several sizes. Leave it out."
            )
        patch, unit = squares.patch_and_unit(self.model.config)
        edge = pick_size(wish, unit, published, self.title, enlarges=True)
        if edge == published:
            return
        resized = squares.with_edge(self.processor, edge, (edge // unit) ** 2)
        if self._takes_images_of(resized):
            self.processor = resized
        elif not wish.auto:
            raise UsageError(
                f"--image-size {wish.pixels}: the vision encoder of this model is fixed to images of {published} "
                f"pixels. Leave it out, or say {published}."
            )

    @torch.no_grad()
    def _takes_images_of(self, processor: Any) -> bool:
        """Whether the vision encoder makes as many features of an image as a processor puts tokens into the text."""
        image = Image.effect_noise(PROBE_SIZE, 80).convert("RGB")
        try:
            batch = processor(text=[self._placeholder], images=[[image]], return_tensors="pt")
            inputs = {name: tensor.to(self.model.device) for name, tensor in batch.items() if name not in TEXT_INPUTS}
            return len(self.image_features(inputs)) == int((batch["input_ids"] == self.image_token_id).sum()) > 0
        except Exception:  # each vision encoder has its own way to refuse a size
            return False

    def image_load(self, image_size: ImageSize | None = None) -> tuple[int, int]:
        """One tile, as the configuration says; if it does not say, about what most models have."""
        config = self.model.config
        published = squares.first(getattr(config.vision_config, "image_size", 384))
        patch, unit = squares.patch_and_unit(config)
        if image_size is not None:
            edge = pick_size(image_size, unit, published, self.title, enlarges=True)
            return (edge // patch) ** 2, (edge // unit) ** 2
        patches = (published // patch) ** 2
        tokens = getattr(config, "image_seq_length", None) or getattr(config, "mm_tokens_per_image", None)
        return patches, min(tokens or patches, patches)

    def _whole_ids(self, images: list[Image.Image]) -> tuple[list[list[int]], dict[str, Tensor]]:
        """Conversation and image, as the processor lays them out.

        Returns:
            rows: for each image its token ids, without padding.
            pixels: all other tensors that the processor gives.
        """
        opening = self._layout.opening
        batch = self.processor(
            text=[opening] * len(images),
            images=[[image] for image in images],
            return_tensors="pt",
            padding=True,
            add_special_tokens=not self._begins(opening),
        )
        rows = [
            ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        return rows, {name: tensor for name, tensor in batch.items() if name not in TEXT_INPUTS}

    def encode_images(self, images: list[Image.Image]) -> EncodedImages:
        rows, pixels = self._whole_ids(images)
        start, end = len(self._prefix), len(self._question)
        for row in rows:
            if row[:start] != self._prefix or row[len(row) - end :] != self._question:
                raise RuntimeError("the processor lays out this image in another way than the first one")
        return EncodedImages(pixels, [row[start : len(row) - end] for row in rows])

    def image_features(self, inputs: dict[str, Tensor]) -> Tensor:
        if ENCODER_FEATURES in inputs or CONNECTED_FEATURES in inputs:
            return super().image_features(inputs)
        get = self.body.get_image_features
        known = inspect.signature(get).parameters
        inputs = {
            name: t.to(self.model.dtype) if t.is_floating_point() else t for name, t in inputs.items() if name in known
        }
        features = get(**inputs).pooler_output
        # One tensor, or one for each image: (..., D) each -> (number of placeholders, D)
        each = features if isinstance(features, list | tuple) else [features]
        return torch.cat([part.reshape(-1, part.shape[-1]) for part in each])

    @cached_property
    def can_cache(self) -> bool:
        """Whether the features are what one connector makes of the vision encoder's, and the same in a batch. Tried on
        two images."""
        if not self.shares_prefix or len(self.connector) != 1:
            return False
        noise = [Image.effect_noise(size, 80).convert("RGB") for size in (PROBE_SIZE, PROBE_SIZE[::-1])]
        try:
            with torch.no_grad():
                images = [self.encode_images([one]) for one in noise]
                alone = [self.features_of_each([one], connected=True)[0] for one in images]
                whole = torch.cat(self.features_of_each(images, connected=True))
                encoder = torch.cat(self.features_of_each(images, connected=False))
                share = 1e-3 if whole.dtype in (torch.float32, torch.float64) else 5e-2
                atol = share * float(whole.abs().max())  # the order of adding depends on how tensors lie in memory
                others = (torch.cat(alone), self.connect(encoder, {}))
                return all(torch.allclose(other, whole, rtol=0, atol=atol) for other in others)
        except Exception:  # a vision encoder that does not hand its features to the connector in one tensor
            return False

    def vision_features(self, inputs: dict[str, Tensor]) -> Tensor:
        """(rows, vision width) or more dimensions: what reaches the connector."""
        caught: list[Tensor] = []

        def catch(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            caught.append(arguments[0])
            raise _Reached

        hook = self.connector[0].register_forward_pre_hook(catch)
        try:
            self.image_features(inputs)
        except _Reached:
            pass
        finally:
            hook.remove()
        return caught[0]

    def connect(self, hidden: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        features = self.connector[0](hidden)
        # (images or tiles, tokens of one, D) -> (number of placeholders, D)
        return features.reshape(-1, features.shape[-1])

    # The plain forward

    def full_logits(self, ids: Tensor, mask: Tensor, response: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """Logits by transformers' own forward.

        Args:
            ids: (B, K) with padding on the right.
            mask: (B, K) bool, False at padding.
            response: (B, K) bool, True at the tokens of the response.
            inputs: tensors of the images.

        Returns:
            (B, K, V) float32 at least.
        """
        images = (ids == self.image_token_id).long()
        known = inspect.signature(self.model.forward).parameters
        # PaliGemma reads the prompt in both directions and the response (1) in one; the others mark the image tokens.
        types = response.long() if self.model.config.model_type == "paligemma" else images
        extra = {
            name: value for name, value in (("token_type_ids", types), ("mm_token_type_ids", images)) if name in known
        }
        inputs = {name: t.to(self.model.dtype) if t.is_floating_point() else t for name, t in inputs.items()}
        logits = self.model(input_ids=ids, attention_mask=mask.long(), **inputs, **extra, use_cache=False).logits
        return logits if logits.dtype == torch.float64 else logits.float()
