"""The model of the demo: a small Idefics3 with random weights, its tokenizer and its processor, built in a second."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)

from vlm.config import Settings
from vlm.conversation import build_prompts
from vlm.families.pretrained import quiet

DEMO_NAME = "demo"  # what the metadata calls the model
IMAGE_SIZE = 32  # pixels; the digits have 8
PATCH_SIZE = 8  # 2 x 2 of their pixels
SCALE_FACTOR = 2  # 2 x 2 patches become one image token: 4 tokens an image
SPECIAL_TOKENS = ["<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>"]
# The layout of SmolVLM-Instruct: see docs/architecture.md.
CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def build_demo_model(folder: Path, settings: Settings, class_names: list[str]) -> None:
    """Write a model of 0.4M parameters into a folder, laid out as on the hub. The same seed gives the same weights."""
    prompts = build_prompts(settings, class_names)
    corpus = [prompts.system, prompts.question, *prompts.responses]
    processor = build_processor(IMAGE_SIZE, PATCH_SIZE, SCALE_FACTOR, corpus, prompts.shown_names)
    torch.manual_seed(settings.seed)
    model = build_model(
        processor,
        vision={"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4},
        text={
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        scale_factor=SCALE_FACTOR,
    )
    with quiet():
        model.save_pretrained(folder)
    processor.save_pretrained(folder)


def build_processor(
    image_size: int, patch_size: int, scale_factor: int, corpus: list[str], class_names: Sequence[str] = ()
) -> Idefics3Processor:
    """A processor with a byte-level BPE tokenizer that is trained on `corpus` and can write any text.

    Args:
        image_size, patch_size: edges in pixels.
        scale_factor: so many patches in a line, and as many lines, become one image token.
        corpus: texts.
        class_names: if given, tokens may be whole phrases, and each class name is a token of its own. A model with
            random weights then learns the classes and not the spelling of the sentences around them: the demo's
            response has 8 tokens instead of 32.
    """
    tokenizer = _train_tokenizer(corpus, class_names)
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": image_size}, max_image_size={"longest_edge": image_size}, do_image_splitting=False
    )
    tokens = (image_size // patch_size) ** 2 // scale_factor**2
    return Idefics3Processor(images, tokenizer, image_seq_len=tokens, chat_template=CHAT_TEMPLATE)


def _train_tokenizer(corpus: list[str], class_names: Sequence[str]) -> PreTrainedTokenizerFast:
    """The tokenizer of `build_processor`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if class_names:
        names = "|".join(map(re.escape, sorted(class_names, key=len, reverse=True)))
        apart = pre_tokenizers.Split(Regex(f" ?\\b({names})\\b"), behavior="isolated")
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [apart, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    # Every conversation has " Assistant:" and the like. Words are repeated so that each becomes a token of its own.
    bpe.train_from_iterator([*corpus, " System: User: Assistant:"] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_start|>",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS})
    return tokenizer


def build_model(
    processor: Idefics3Processor,
    vision: dict[str, int],
    text: dict[str, int],
    image_size: int,
    patch_size: int,
    scale_factor: int,
) -> Idefics3ForConditionalGeneration:
    """A model with random weights that fits the processor."""
    tokenizer = processor.tokenizer
    end = tokenizer.convert_tokens_to_ids("<end_of_utterance>")
    both: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id, "tie_word_embeddings": False}
    config = Idefics3Config(
        vision_config={"image_size": image_size, "patch_size": patch_size, **vision},
        text_config={
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],  # where the converter of llama.cpp looks for it
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 2048,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": end,
            **both,
            **text,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=scale_factor,
        **both,
    )
    model = Idefics3ForConditionalGeneration(config)
    model.generation_config.eos_token_id = end
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model
