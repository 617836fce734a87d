"""What the rest of the program may ask of an architecture.

B = batch, P = prefix tokens, L = tokens of a row, K = cached and new tokens, D = width, V = vocabulary.
"""

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer

from vlm.common import UsageError, dtype_name, first_line
from vlm.config import ImageSize
from vlm.conversation import Prompts, Rendered, scored_texts
from vlm.families.encoded import CONNECTED_FEATURES, ENCODER_FEATURES, EncodedImages
from vlm.families.images.sizes import size_text
from vlm.families.quantization import forget_quantizer, loading_options

COMPILATIONS = 4  # of a block: for rows and prefix, with and without gradients


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars, which are for files of gigabytes and print the same lines for each small
    one."""
    was_on = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            transformers.utils.logging.enable_progress_bar()


def _run_again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return (
        checkpoint(forward, *args, use_reentrant=False, **kwargs)
        if torch.is_grad_enabled()
        else forward(*args, **kwargs)
    )


class Family:
    """One architecture: how it reads text and images, and what its parts are called.

    A family file says `model_types`, `vision`, `connector`, `language`, `encode_images`, `vision_features` and, where
    they differ, the rest.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    title: ClassVar[str] = ""  # what people call it
    # The settings about images that it knows, with their values in training where none is given (see `load_family`).
    image_defaults: ClassVar[dict[str, Any]] = {}
    shares_prefix = True  # else everything goes through `full_logits`, with the prefix in every row
    can_cache = True  # whether what the encoder makes of several images is what it makes of each, one after the other
    must_be_checked = False  # whether the shared prefix has to be held against the plain forward first

    def __init__(self, model: nn.Module, processor: Any):
        self.model = model
        self.processor = processor
        self.tokenizer = processor.tokenizer

    def without_weights(self) -> "Family":
        """The same family for loader processes, which only encode images and should get no copy of the weights."""
        light = copy.copy(self)
        light.model = None
        return light

    # Loading

    @classmethod
    def load(
        cls, folder: Path, dtype: torch.dtype, device: torch.device, bits: int | None = None, **images: Any
    ) -> "Family":
        """Load weights (safetensors only) and processor from a local folder. `images` goes to `load_processor`.

        The weights are read into tensors of `dtype`, the language model's linear layers of `bits` bits where that is
        given, one after the
        other: there is never a second copy of them.
        """
        processor = cls.load_processor(folder, **images)
        kept = (
            cls.outline(AutoConfig.from_pretrained(folder, local_files_only=True)).linear_layers(language=False)
            if bits
            else []
        )
        try:
            with quiet():
                model, report = AutoModelForImageTextToText.from_pretrained(
                    folder, dtype=dtype, attn_implementation="sdpa", use_safetensors=True, output_loading_info=True, local_files_only=True,
                    **loading_options(bits, dtype, device, kept),
                )  # fmt: skip
        except OSError as error:
            raise UsageError(f"the weights in {folder} cannot be read: {first_line(error)}") from error
        missing = sorted(report["missing_keys"])
        if missing:
            raise UsageError(
                f"the weights in {folder} are incomplete: {len(missing)} are missing, such as {missing[0]}. Download it again."
            )
        if bits:
            forget_quantizer(model)
        return cls(model.to(device), processor)

    @classmethod
    def outline(cls, config: PreTrainedConfig) -> "Family":
        """The architecture alone, with neither values of the weights nor processor: to name its parts and count their
        parameters."""
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        family = cls.__new__(cls)
        family.model, family.processor = model, None
        return family

    @classmethod
    def load_processor(cls, folder: Path, **images: Any) -> Any:
        """The processor in a folder, with the options named in `image_defaults`; one that is None or left out is as the
        folder says."""
        raise NotImplementedError

    def save(self, folder: Path, state: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Write weights and processor so that transformers loads them without this program."""
        # Tensors that were converted share no memory any more, by which transformers would know that they are tied.
        state = {name: tensor for name, tensor in state.items() if name not in self.model.all_tied_weights_keys}
        with quiet():
            self.model.save_pretrained(folder, state_dict=state)
        self.processor.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["dtype"] = dtype_name(dtype)  # that of the saved weights, not of the ones being trained
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    # The parts

    @property
    def vision(self) -> nn.Module:
        """The vision encoder, without the connector."""
        raise NotImplementedError

    @property
    def connector(self) -> nn.Module:
        """What turns vision features into the width of the language model."""
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
        """Pixels of an image's edge, as it is processed and as published; None where images keep sizes of their own."""
        return None

    def size_text(self, wish: ImageSize) -> str:
        """What `--image-size` came to and what it costs, for people."""
        if self.edges is None:
            return f"as {self.title} takes it."
        loads = [self.image_load(image_size=ImageSize(edge)) for edge in self.edges]
        return size_text(wish, *self.edges, *loads)

    def image_load(self, **images: Any) -> tuple[int, int]:
        """Patches that the vision encoder reads of the largest image, and the tokens that it becomes; of the
        configuration alone.

        Args:
            images: as in `load_processor`.
        """
        raise NotImplementedError

    def layers(self) -> list[GradientCheckpointingLayer]:
        """The blocks of both encoders."""
        return [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]

    def checkpoint_layers(self) -> None:
        """Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174): every block keeps its input alone, and is run
        again on the way back.

        transformers' own switch leaves out the cache, and with it the prefix.
        """
        for layer in self.layers():
            layer.forward = partial(_run_again, layer.forward)

    def compile_layers(self, backend: str = "inductor") -> None:
        """Let torch compile the blocks of the language model: at the first use, and again for lengths of another
        kind."""
        inside = {id(module) for module in self.language.modules()}
        blocks = [layer for layer in self.layers() if id(layer) in inside]
        # They share their code, of which torch gives up after eight compilations; each block's number is a reason for
        # one.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILATIONS * len(blocks))
        for layer in blocks:
            layer.compile(backend=backend, dynamic=True)

    # Text

    @property
    def device(self) -> torch.device:
        """Where the model is, and where its inputs have to be."""
        return next(self.model.parameters()).device

    @property
    def image_token(self) -> str:
        """The placeholder of an image in the rendered conversation."""
        return self.processor.image_token

    @property
    def image_token_id(self) -> int:
        """The token whose embedding is replaced by an image feature."""
        return self.tokenizer.convert_tokens_to_ids(self.image_token)

    @property
    def end_of_turn(self) -> str:
        """The token that ends the model's turn."""
        raise NotImplementedError

    @property
    def stop_ids(self) -> list[int]:
        """Tokens at which the model's turn is over when it writes."""
        return [self.tokenizer.convert_tokens_to_ids(self.end_of_turn)]

    @property
    def max_length(self) -> int:
        return self.model.config.get_text_config().max_position_embeddings

    def render(self, prompts: Prompts) -> Rendered:
        """Conversation and responses -> token ids.

        Raises:
            UsageError: a text holds an image placeholder or a special token that breaks the conversation.
        """
        opening = self.apply_template(prompts.messages(), add_generation_prompt=True)
        pieces = opening.split(self.image_token)
        if len(pieces) != 2:
            raise UsageError(
                f"the texts hold {len(pieces) - 2} {self.image_token} of their own, which stands for an image: leave it out."
            )
        return self.rendered(prompts, self.tokenize(pieces[0]), self.tokenize(pieces[1]))

    def rendered(self, prompts: Prompts, prefix: list[int], question: list[int]) -> Rendered:
        """Prefix and question with the responses of the classes and what of them is scored."""
        responses = [self.response_ids(prompts, text) for text in prompts.responses]
        return Rendered(prefix, question, responses, scored_texts(self, prompts, responses), self.max_length, prompts)

    def response_ids(self, prompts: Prompts, text: str) -> list[int]:
        """The tokens of one response to a conversation that was rendered, end of turn included. Runs in loader
        processes, too."""
        turn = self.turn(prompts, text)
        return self.tokenize(turn[: turn.rindex(self.end_of_turn)] + self.end_of_turn)

    def turn(self, prompts: Prompts, text: str) -> str:
        """What the chat template adds to a conversation that is answered with a text."""
        opening = self.apply_template(prompts.messages(), add_generation_prompt=True)
        answered = [*prompts.messages(), {"role": "assistant", "content": [{"type": "text", "text": text}]}]
        return self.apply_template(answered, add_generation_prompt=False).removeprefix(opening)

    def apply_template(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        return self.processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)

    def tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(self, ids: list[int], exact: bool = False) -> str:
        """Token ids -> text; special tokens and white space around it are kept only if it is to be exact."""
        return self.tokenizer.decode(ids) if exact else self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    # Images

    def encode_images(self, images: list[Image.Image]) -> EncodedImages:
        """RGB images -> tensors and tokens. Runs in loader processes, without the weights."""
        raise NotImplementedError

    def vision_features(self, inputs: dict[str, Tensor]) -> Tensor:
        """What the vision encoder makes of the images, before the connector: one row for each row of pixels."""
        raise NotImplementedError

    def image_features(self, inputs: dict[str, Tensor]) -> Tensor:
        """(number of placeholders of all images, D) features in the order of the placeholders."""
        if CONNECTED_FEATURES in inputs:
            return inputs[CONNECTED_FEATURES]
        return self.connect(self.encoder_features(inputs), inputs)

    def encoder_features(self, inputs: dict[str, Tensor]) -> Tensor:
        """`vision_features`, or those of the cache where a batch was made of them."""
        if ENCODER_FEATURES in inputs:
            return inputs[ENCODER_FEATURES]
        frozen = not any(p.requires_grad for p in self.vision.parameters())
        with torch.no_grad() if frozen else nullcontext():  # a frozen encoder would keep a graph otherwise
            return self.vision_features(inputs)

    def connect(self, hidden: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """What `vision_features` gave -> (number of placeholders, D)."""
        features = self.connector(hidden)
        return features.reshape(-1, features.shape[-1])

    def features_of_each(self, images: Sequence[EncodedImages], connected: bool) -> list[Tensor]:
        """The features of several images, each encoded by itself, from one pass over all of them.

        Args:
            connected: behind the connector, where an image has one row for each of its placeholders; else before it,
                where it has as many as of pixels (tiles or patches).
        """
        inputs = {name: torch.cat([one.inputs[name] for one in images]).to(self.device) for name in images[0].inputs}
        if connected:
            rows = [one.token_ids[0].count(self.image_token_id) for one in images]
            return list(self.image_features(inputs).split(rows))
        return list(self.encoder_features(inputs).split([len(one.inputs["pixel_values"]) for one in images]))

    # The language model

    @property
    def vocabulary(self) -> int:
        """How many numbers the logits of a token have."""
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
        return DynamicCache(config=self.model.config)

    def run_language(
        self, embeddings: Tensor, positions: Tensor, cache: Cache | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """(B, L, D) -> hidden states (B, L, D).

        Args:
            positions: from `positions` or `text_positions`.
            cache: keys and values of earlier tokens; the new ones are added to it.
            mask: (B, 1, L, K) bool, True where a token (L) sees another (K); without it every token sees itself and all
                before it.
        """
        return self.language(
            inputs_embeds=embeddings,
            position_ids=positions,
            past_key_values=cache,
            attention_mask=mask,
            use_cache=cache is not None,
        ).last_hidden_state

    def full_logits(self, ids: Tensor, mask: Tensor, response: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """The plain forward over whole sequences; only a family that may not share its prefix has to have one."""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V) in float32 at least."""
        scores = self.model.get_output_embeddings()(hidden)
        return scores if scores.dtype == torch.float64 else scores.float()
