"""Any other image-text-to-text model that transformers knows, driven by its processor and chat template.

Nothing is assumed of a model but `forward`. Where it has a language model that takes embeddings and a cache, the shared
prefix is used, after a check against the plain forward at start (`vlm/classifier/classifier.py`); else everything goes
through the plain forward.

B = batch, K = tokens of a whole sequence, D = width, V = vocabulary.
"""

import inspect
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from vlm.common import UsageError, first_line, note
from vlm.config import ImageSize
from vlm.conversation import Prompts, Rendered
from vlm.families.base import Family
from vlm.families.encoded import CONNECTED_FEATURES, ENCODER_FEATURES, EncodedImages
from vlm.families.images import squares
from vlm.families.images.sizes import pick_size
from vlm.families.processors import processor_class_of, read_processor

TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels")
VISION_NAMES = ("vision_tower", "vision_model", "visual", "vision_encoder", "image_tower")
# Their image tokens, or the whole prompt, see each other in both directions, which a small model may hide from the
# check.
BIDIRECTIONAL = ("gemma3", "gemma4", "paligemma")
PROBE_SIZE = (64, 48)  # pixels of the image that shows where a processor puts its tokens


class _Reached(Exception):
    """The encoder is done."""


class GenericFamily(Family):
    """A model that is driven through its processor. `shares_prefix` may be switched off by the check at start."""

    title = "this model"
    image_defaults = {"image_size": None}
    must_be_checked = True
    _published_edge: int | None = None  # of the processor, before another size was set

    def __init__(self, model: nn.Module, processor: Any):
        super().__init__(model, processor)
        if model.config.model_type in BIDIRECTIONAL:
            note(
                f"{model.config.model_type} reads images in both directions: no prefix can be shared, training takes the plain forward."
            )
            self.shares_prefix = False

    @classmethod
    def load(
        cls,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        bits: int | None = None,
        image_size: ImageSize | None = None,
    ) -> "GenericFamily":
        family = super().load(folder, dtype, device, bits)
        family._published_edge = squares.edge_of(family.processor.image_processor)
        if image_size is not None:
            family._set_size(image_size)
        return family

    @classmethod
    def load_processor(cls, folder: Path, **options: Any) -> Any:
        try:
            return read_processor(folder, processor_class_of(folder))
        except (ImportError, OSError, ValueError) as error:
            raise UsageError(f"the processor in {folder} cannot be loaded: {first_line(error)}") from error

    # The parts

    @property
    def body(self) -> nn.Module:
        """What holds vision, connector and language side by side."""
        return getattr(self.model, "model", self.model)

    @property
    def vision(self) -> nn.Module:
        return next((getattr(self.body, name) for name in VISION_NAMES if hasattr(self.body, name)), nn.ModuleList())

    @property
    def language(self) -> nn.Module:
        return getattr(self.body, "language_model", None) or self.model.get_decoder()

    @property
    def connector(self) -> nn.Module:
        """All that is neither vision nor language."""
        return nn.ModuleList(
            child for child in self.body.children() if child is not self.vision and child is not self.language
        )

    # Text

    @cached_property
    def image_token_id(self) -> int:
        """Kept, for loader processes, which have no model."""
        config = self.model.config
        for name in ("image_token_id", "image_token_index"):
            if getattr(config, name, None) is not None:
                return getattr(config, name)
        raise UsageError(
            f"a model of type {config.model_type} names no image token in its config: it cannot be driven."
        )

    @property
    def stop_ids(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else list(ends or [])
        return list(dict.fromkeys([self._closing_ids[-1], *ends]))

    def render(self, prompts: Prompts) -> Rendered:
        """Let the processor lay out an image, and see what stands before and after its tokens."""
        self._opening = self._render_opening(prompts)
        probe = self._whole_ids([Image.new("RGB", PROBE_SIZE)])[0][0]
        places = [i for i, token in enumerate(probe) if token == self.image_token_id]
        if not places:
            raise UsageError(
                "the processor puts no image token into the conversation: the model would learn from the text alone."
            )
        self._prefix = probe[: places[0]] if self.shares_prefix else []
        self._question = probe[places[-1] + 1 :]
        return self.rendered(prompts, self._prefix, self._question)

    def _render_opening(self, prompts: Prompts) -> str:
        """The conversation up to the model's turn. A model without a system role gets the instructions at the head of
        the user's turn."""
        asked = prompts.messages()[-1]["content"]
        in_user_turn = [{"role": "user", "content": [{"type": "text", "text": prompts.system + "\n"}, *asked]}]
        self._closing_ids = [self.tokenizer.eos_token_id]
        if not getattr(self.processor, "chat_template", None):
            note("the model has no chat template: image, instructions and question are put one after the other.")
            return f"{self._placeholder}{prompts.system}\n{prompts.question}\n"
        for messages in (prompts.messages(), in_user_turn):
            try:
                opening = self.apply_template(messages, add_generation_prompt=True)
            except Exception:  # templates refuse a system role each in its own way
                continue
            if prompts.system in opening and prompts.question in opening:
                break
        else:
            raise UsageError(
                "the chat template of the model drops the instructions or the question: it cannot be used."
            )
        if opening.count(self._placeholder) != 1:
            raise UsageError(
                f"the conversation holds {opening.count(self._placeholder)} of {self._placeholder}, expected 1: leave it out of the texts."
            )
        self._find_closing(messages, opening)
        return opening

    @property
    def _placeholder(self) -> str:
        """What a template writes for an image, before the processor puts in its tokens."""
        return getattr(self.processor, "boi_token", None) or getattr(self.processor, "image_token", "<image>")

    def _find_closing(self, messages: list[dict[str, Any]], opening: str) -> None:
        """What the template puts after the model's turn, which the model has to learn as its end."""
        mark = "ANSWER"
        answered = [*messages, {"role": "assistant", "content": [{"type": "text", "text": mark}]}]
        turn = self.apply_template(answered, add_generation_prompt=False).removeprefix(opening)
        before, _, after = turn.partition(mark)
        closing = self.tokenize(after.rstrip())
        if closing:
            self._closing_ids = closing
        self._before = before if len(before) <= 1 else ""  # a space that belongs to the answer

    def response_ids(self, prompts: Prompts, text: str) -> list[int]:
        """As it is tokenized behind the question, and the end of the turn."""
        before = getattr(self, "_before", "")
        tail = self._opening[-20:]
        alone, together = self.tokenize(tail), self.tokenize(tail + before + text)
        ids = together[len(alone) :] if together[: len(alone)] == alone else self.tokenize(before + text)
        return ids + self._closing_ids

    # Images

    @property
    def edges(self) -> tuple[int, int] | None:
        return (squares.edge_of(self.processor.image_processor), self._published_edge) if self._published_edge else None

    def size_text(self, wish: ImageSize) -> str:
        return super().size_text(wish) if self.edges else "as the model's processor makes it."

    def _set_size(self, wish: ImageSize) -> None:
        """Have the processor make images of this size, where the encoder takes them: tried on an image.

        Raises:
            UsageError: exactly so many pixels do not work. (auto goes back to the published size.)
        """
        published = self._published_edge
        if published is None:
            if wish.auto:
                return
            raise UsageError(
                f"--image-size {wish.pixels}: the processor of this model makes images of no one size. Leave it out."
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
                f"--image-size {wish.pixels}: the vision encoder of this model is fixed to images of {published} pixels. "
                f"Leave it out, or say {published}."
            )

    @torch.no_grad()
    def _takes_images_of(self, processor: Any) -> bool:
        """Whether the encoder makes as many features of an image as a processor puts tokens into the text."""
        image = Image.effect_noise(PROBE_SIZE, 80).convert("RGB")
        try:
            batch = processor(text=[self._placeholder], images=[[image]], return_tensors="pt")
            inputs = {name: tensor.to(self.model.device) for name, tensor in batch.items() if name not in TEXT_INPUTS}
            return len(self.image_features(inputs)) == int((batch["input_ids"] == self.image_token_id).sum()) > 0
        except Exception:  # encoders refuse a size each in its own way
            return False

    def image_load(self, image_size: ImageSize | None = None) -> tuple[int, int]:
        """What the configuration says of one tile; of a model that says nothing, about what most have."""
        config = self.model.config
        published, (patch, unit) = (
            squares.first(getattr(config.vision_config, "image_size", 384)),
            squares.patch_and_unit(config),
        )
        if image_size is not None:
            edge = pick_size(image_size, unit, published, self.title, enlarges=True)
            return (edge // patch) ** 2, (edge // unit) ** 2
        patches = (published // patch) ** 2
        tokens = getattr(config, "image_seq_length", None) or getattr(config, "mm_tokens_per_image", None)
        return patches, min(tokens or patches, patches)

    def _whole_ids(self, images: list[Image.Image]) -> tuple[list[list[int]], dict[str, Tensor]]:
        """The processor's own token ids of conversation and image, one list an image, and the pixels."""
        opening = self._opening
        twice = self.tokenizer.bos_token is not None and opening.startswith(self.tokenizer.bos_token)
        batch = self.processor(
            text=[opening] * len(images),
            images=[[p] for p in images],
            return_tensors="pt",
            padding=True,
            add_special_tokens=not twice,
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
        features = (
            torch.cat([f.reshape(-1, f.shape[-1]) for f in features])
            if isinstance(features, list | tuple)
            else features
        )
        return features.reshape(-1, features.shape[-1])

    @cached_property
    def can_cache(self) -> bool:
        """Whether the features are those of one connector behind the encoder, and the same in a batch: tried on two
        images."""
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
                same = torch.allclose(torch.cat(alone), whole, rtol=0, atol=share * float(whole.abs().max()))
                return same and torch.equal(self.connect(encoder, {}), whole)
        except Exception:  # an encoder that does not hand its features to the connector in one tensor
            return False

    def vision_features(self, inputs: dict[str, Tensor]) -> Tensor:
        """What reaches the connector."""
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
        return features.reshape(-1, features.shape[-1])

    # The plain forward

    def full_logits(self, ids: Tensor, mask: Tensor, response: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """(B, K, V) by transformers' own forward.

        Args:
            ids: (B, K) with padding on the right. mask: (B, K) False at padding. response: (B, K) True at the
                response's tokens.
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
