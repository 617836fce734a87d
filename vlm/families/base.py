"""What the rest of the program may ask of an architecture.

B = batch, L = tokens of a row, K = cached and new tokens, D = width of the language model, V = vocabulary.
"""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache

from vlm.common import RunError, is_out_of_memory
from vlm.config import ImageSize
from vlm.data import COPY_AGAIN, Sample, UnreadableImage
from vlm.families.configuration import build_config, read_config
from vlm.families.encoded import CONNECTED_FEATURES, ENCODER_FEATURES, EncodedImages, all_features, besides_pixels
from vlm.families.images.sizes import size_text
from vlm.families.pretrained import blaming, brief
from vlm.families.processors import write_for_older_programs
from vlm.families.texts import FamilyTexts
from vlm.families.weights import cache_argument, read_model, write_model


class Family(FamilyTexts):
    """One architecture: how it reads text and images, and what its parts are called.

    A new family is a subclass in a file of its own and an entry in `FAMILIES` (loading.py). It has to say:

        model_types, title         which configurations it is for, and its name in messages
        load_processor             the published processor, with the image options of the settings
        vision, connector, language   the three parts of the model
        end_of_turn                the token that ends the model's turn
        encode_images              images -> tensors and tokens
        vision_features            tensors -> what the vision encoder makes of them
        image_load                 patches and tokens of an image, for the estimate of memory

    and, only if they differ: image_defaults (its image options), edges or size_text (what --image-size came to),
    connect (if the connector needs more than the features), positions and text_positions (if a token has several),
    new_cache, run_language, stop_ids, max_length, render, response_ids, apply_template, tokenize, save.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    title: ClassVar[str] = ""
    # The settings about images that it knows, with the values of a training run that gives none (see `load_family`).
    image_defaults: ClassVar[dict[str, Any]] = {}

    shares_prefix = True  # False: every row repeats the prefix and goes through `full_logits`
    must_be_checked = False  # True: the shared prefix is compared with the plain forward before it is used

    def __init__(self, model: Any, processor: Any):
        self.model = model
        self.processor = processor
        self.tokenizer = processor.tokenizer

    def without_weights(self) -> Self:
        """The same family for loader processes. They only encode images and should not get a copy of the weights."""
        light = copy.copy(self)
        light.model = None
        return light

    # Loading

    @classmethod
    def load(
        cls, folder: Path, dtype: torch.dtype, device: torch.device, bits: int | None = None, **images: Any
    ) -> Self:
        """Load weights and processor from a local folder.

        Args:
            dtype: the number format of the weights; the language model's linear layers have `bits` bits if given.
            images: as in `load_processor`.

        Raises:
            UsageError: the weights or the processor cannot be read, or the image options do not fit the model.
        """
        config = build_config(read_config(folder), folder / "config.json")
        with blaming(f"the processor in {folder} does not fit its config.json", COPY_AGAIN):
            processor = cls.load_processor(folder, **images)
        with blaming(f"{folder / 'config.json'} does not describe a model that can be built", COPY_AGAIN):
            outline = cls.outline(config)
            kept = outline.linear_layers(language=False) if bits else []
        described = sum(p.numel() for p in outline.model.parameters())
        return cls(read_model(folder, config, dtype, device, bits, kept, described), processor)

    @classmethod
    def outline(cls, config: PreTrainedConfig) -> Self:
        """A family without values of the weights and without processor: to name parts and count parameters."""
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
        family = cls.__new__(cls)
        family.model, family.processor = model, None
        return family

    @classmethod
    def load_processor(cls, folder: Path, *args: Any, **images: Any) -> Any:
        """The processor in a folder.

        Args:
            images: the options named in `image_defaults`. One that is None or left out stays as the folder says.
        """
        raise NotImplementedError

    def save(self, folder: Path, state: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Write weights (`state`, all of `dtype`) and processor so that transformers reads them by itself."""
        write_model(self.model, folder, state, dtype)
        self.processor.save_pretrained(folder)
        write_for_older_programs(folder)

    # The parts

    @property
    def device(self) -> torch.device:
        """Where the model is, and where its inputs have to be."""
        return next(self.model.parameters()).device

    @property
    def vision(self) -> nn.Module:
        """The vision encoder, without the connector."""
        raise NotImplementedError

    @property
    def connector(self) -> nn.Module:
        """The layers that turn vision features into the width of the language model."""
        raise NotImplementedError

    @property
    def language(self) -> nn.Module:
        """The language model without its head: embeddings -> hidden states."""
        raise NotImplementedError

    def linear_layers(self, language: bool) -> list[str]:
        """Names of the linear layers in the language model, or (False) of all others."""
        inside = {id(module) for module in self.language.modules()}
        return [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and (id(module) in inside) == language
        ]

    @property
    def edges(self) -> tuple[int, int] | None:
        """The edge of an image in pixels, as processed and as published; None if images differ in size."""
        return None

    def size_text(self, wish: ImageSize) -> str:
        """A message: what `--image-size` came to, and what it costs."""
        if self.edges is None:
            return f"as {self.title} takes it."
        loads = [self.image_load(image_size=ImageSize(edge)) for edge in self.edges]
        return size_text(wish, *self.edges, *loads)

    def image_load(self, *args: Any, **images: Any) -> tuple[int, int]:
        """How much work the largest image is, read from the configuration only.

        Args:
            images: as in `load_processor`.

        Returns:
            patches: how many the vision encoder reads.
            tokens: how many the language model reads.
        """
        raise NotImplementedError

    # Images

    def encode_images(self, images: list[Image.Image]) -> EncodedImages:
        """RGB images -> tensors and tokens. Runs in loader processes, without the weights."""
        raise NotImplementedError

    def refusal(self, image: Image.Image) -> str | None:
        """Why the processor does not take an image, None if it does."""
        try:
            self.encode_images([image])
        except Exception as error:  # each processor has its own way to refuse an image
            if is_out_of_memory(error):
                raise
            return f"{image.width} x {image.height} pixels, which {self.title} cannot take ({brief(error)})"
        return None

    def refusal_of_size(self, width: int, height: int) -> str | None:
        """Why the processor takes no image of a size in pixels, None if it does. Here: tried on a blank one."""
        return self.refusal(Image.new("RGB", (width, height)))

    def encode_samples(self, samples: Sequence[Sample]) -> EncodedImages:
        """The images of some samples, as in `encode_images`.

        Raises:
            RunError: one of them cannot be read or used; the message names it.
        """
        try:
            return self.encode_images([sample.image for sample in samples])
        except UnreadableImage as error:
            raise RunError(f"{error}. It was readable before: repair it, then continue with --resume.") from error
        except Exception as error:
            for sample in samples:
                if reason := self.refusal(sample.image):
                    raise RunError(f"{sample.name}: {reason}. Repair it, then continue with --resume.") from error
            raise

    def vision_features(self, inputs: dict[str, Tensor]) -> Tensor:
        """What the vision encoder makes of the images, before the connector.

        Returns:
            one row for each row of `pixel_values`, in the same order.
        """
        raise NotImplementedError

    def image_features(self, inputs: dict[str, Tensor]) -> Tensor:
        """(number of placeholders of all images, D) features in the order of the placeholders."""
        if CONNECTED_FEATURES in inputs:
            return all_features(inputs[CONNECTED_FEATURES], inputs, self.image_features)
        return self.connect(self.encoder_features(inputs), inputs)

    def with_features(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inputs with connected features instead of pixels, so that images that are read twice are encoded once."""
        return besides_pixels(inputs) | {CONNECTED_FEATURES: self.image_features(inputs)}

    def encoder_features(self, inputs: dict[str, Tensor]) -> Tensor:
        """`vision_features`, or the cached ones of the images that the feature cache has."""
        if ENCODER_FEATURES in inputs:
            return all_features(inputs[ENCODER_FEATURES], inputs, self.encoder_features)
        frozen = not any(p.requires_grad for p in self.vision.parameters())
        with torch.no_grad() if frozen else nullcontext():  # a frozen vision encoder would keep a graph otherwise
            return self.vision_features(inputs)

    def connect(self, hidden: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """What `vision_features` gave -> (number of placeholders, D)."""
        features = self.connector(hidden)
        # (tiles, tokens of a tile, D) -> (number of placeholders, D)
        return features.reshape(-1, features.shape[-1])

    def features_of_each(self, images: Sequence[EncodedImages], connected: bool) -> list[Tensor]:
        """The features of several images, each encoded by itself, from one pass over all of them.

        Args:
            connected: features after the connector, else before it.

        Returns:
            for each image its features: connected, one row for each of its placeholders; else one row for each row of
            its pixels (tiles or patches).
        """
        inputs = {name: torch.cat([one.inputs[name] for one in images]).to(self.device) for name in images[0].inputs}
        if connected:
            rows = [one.token_ids[0].count(self.image_token_id) for one in images]
            return list(self.image_features(inputs).split(rows))
        return list(self.encoder_features(inputs).split([len(one.inputs["pixel_values"]) for one in images]))

    def shares(self, inputs: dict[str, Tensor], tokens: Sequence[int]) -> list[int]:
        """How much each image has of all rows of the vision encoder, as whole numbers in any unit.

        Args:
            inputs: what the images are, as in `EncodedImages.inputs`. tokens: how many image tokens each image has.
        """
        return list(tokens)

    @property
    def can_cache(self) -> bool:
        """Whether the features of several images are those of each image, one after the other."""
        return True

    # The language model

    @property
    def vocabulary(self) -> int:
        """How many logits a token has."""
        return self.model.get_output_embeddings().weight.shape[0]

    def embed(self, ids: Tensor) -> Tensor:
        """(B, L) token ids -> (B, L, D)."""
        return self.model.get_input_embeddings()(ids)

    def positions(
        self, start: int, input_ids: Tensor, lengths: Tensor, inputs: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Positions of rows that follow `start` prefix tokens.

        Args:
            input_ids: (B, L) the rows. lengths: (B,) their tokens without padding. inputs: what the images are, as in
                `EncodedImages.inputs`; empty without images.

        Returns:
            positions: what `run_language` takes for the rows, here (1, L).
            ends: (B,) the position of the first token after each row.
        """
        places = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)
        return places.unsqueeze(0), start + lengths

    def text_positions(self, positions: Tensor) -> Tensor:
        """(B, L) positions of text tokens -> what `run_language` takes."""
        return positions

    def new_cache(self) -> Cache:
        """An empty cache of keys and values."""
        return DynamicCache(config=self.model.config)

    def run_language(
        self, embeddings: Tensor, positions: Tensor, cache: Cache | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The language model without its head.

        Args:
            embeddings: (B, L, D).
            positions: from `positions` or `text_positions`.
            cache: keys and values of earlier tokens; the new ones are added to it.
            mask: (B, 1, L, K) bool, True if a token (L) sees another (K). Without it a token sees itself and all before
                it.

        Returns:
            (B, L, D) hidden states.
        """
        return self.language(
            inputs_embeds=embeddings,
            position_ids=positions,
            attention_mask=mask,
            use_cache=cache is not None,
            **{cache_argument(type(self.language).forward): cache},
        ).last_hidden_state

    def full_logits(self, ids: Tensor, mask: Tensor, response: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """The plain forward over whole sequences. Only a family that may not share its prefix needs it."""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V) in float32 at least."""
        scores = self.model.get_output_embeddings()(hidden)
        return scores if scores.dtype == torch.float64 else scores.float()
