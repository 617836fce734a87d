"""Small models of the true architecture for tests, built in a second."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlm.classifier.batching import Batch, vlm_collate_fn
from vlm.classifier.classifier import VLMClassifier
from vlm.config import resolve
from vlm.conversation.prompts import Prompts, build_prompts
from vlm.data import Sample
from vlm.families import load_family
from vlm.families.demo import build_model, build_processor
from vlm.inference.model_folder import save_model_folder
from vlm.training.tuning import merged_state_dict

NAMES = ["cat", "catfish", "cat fish", "Straße", "x", "très long nom de classe", "猫"]
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def save_tiny_model(folder: Path, seed: int = 0, image_size: int = 16, tie: bool = False) -> Path:
    """Write an Idefics3 of two layers with random weights and its processor, as on the hub."""
    prompts = tiny_prompts()
    processor = build_processor(image_size, 4, 2, corpus=[prompts.system, prompts.question, *prompts.responses])
    torch.manual_seed(seed)
    model = build_model(processor, VISION, TEXT | {"tie_word_embeddings": tie}, image_size, 4, 2)
    with torch.no_grad():  # the usual start is so small that every class is equally probable
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@cache
def tiny_prompts(names: tuple[str, ...] = tuple(NAMES)) -> Prompts:
    return build_prompts(resolve({}), list(names))


def tiny_classifier(folder: Path, dtype: torch.dtype = torch.float32, names: list[str] = NAMES) -> VLMClassifier:
    return VLMClassifier(load_family(folder, dtype, torch.device("cpu")), tiny_prompts(tuple(names)))


def random_image(seed: int, width: int = 20, height: int = 14) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def samples(labels: list[int]) -> list[Sample]:
    return [Sample(random_image(i), label, f"image {i}") for i, label in enumerate(labels)]


def refusing(size: tuple[int, int], encode: Callable[..., Any]) -> Callable[..., Any]:
    """`encode_images` of a processor that does not take images of this size."""

    def encode_others(images: Sequence[Image.Image]) -> Any:
        if any(image.size == size for image in images):
            raise ValueError("no such shape")
        return encode(images)

    return encode_others


def batch_of(classifier: VLMClassifier, labels: list[int], with_response: bool = True) -> Batch:
    return vlm_collate_fn(samples(labels), classifier.family, classifier.rendered, with_response)


def full_row_logits(classifier: VLMClassifier, row: list[int], pixels: dict) -> torch.Tensor:
    """The reference: transformers' own forward over prefix and row of one sample, without cache -> (L, V)."""
    ids = torch.tensor([classifier.rendered.prefix_ids + row])
    pixels = {name: tensor.unsqueeze(1) for name, tensor in pixels.items()}
    return classifier.model(input_ids=ids, **pixels, use_cache=False).logits[0]


def save_classifier(
    folder: Path,
    classifier: VLMClassifier,
    metadata: dict,
    dtype: torch.dtype,
    write_more: Callable[[Path], None] | None = None,
) -> None:
    """Write the model folder that a training would write."""
    state = merged_state_dict(classifier.model, dtype)
    save_model_folder(folder, classifier.family, state, metadata, dtype, write_more)
