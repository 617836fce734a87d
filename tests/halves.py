"""A small model put together of two halves, and images to train it on: what the tests of its first stage have in
common."""

import json

import numpy as np
import torch
from feature_checks import load
from PIL import Image
from tiny import NAMES, VISION, tiny_prompts

from vlm.config.names import METADATA
from vlm.config.resolve import resolve
from vlm.data.sources import Rows
from vlm.data.splits import Split
from vlm.families import build_model, build_processor

CLASSES = NAMES[:3]
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
COLORS = [(250, 20, 20), (20, 250, 20), (20, 20, 250)]


def save_halves(folder):
    """A model with words that were trained and a connector that was not."""
    prompts = tiny_prompts()
    processor = build_processor(16, 4, 2, corpus=[prompts.system, prompts.question, *prompts.responses])
    torch.manual_seed(0)
    model = build_model(processor, VISION, TEXT, 16, 4, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def image(label, number):
    noise = np.random.default_rng(100 * label + number).normal(0, 30, (16, 16, 3))
    return Image.fromarray(np.clip(noise + COLORS[label], 0, 255).astype(np.uint8))


def split(each, start=0):
    labels = [label for label in range(3) for _ in range(each)]
    images = [image(label, start + i) for label in range(3) for i in range(each)]
    return Split(Rows(images, labels, [f"{i}.png" for i in range(len(labels))]), range(len(labels)), labels)


def save_images(folder):
    """A folder of 12 images a class."""
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir()
        for i in range(12):
            image(label, i).save(folder / name / f"{i}.png")


def settings(folder, images, output, **more):
    flags = {"model": str(folder), "dataset": str(images), "epochs": 1, "batch_size": 4, "output_dir": str(output)}
    flags |= {"align_connector": True}
    return resolve(flags | {"gradient_accumulation_steps": 1} | more)


def resumed(output, **more):
    """The settings of a run that goes on."""
    saved = json.loads((output / METADATA).read_text())["settings"]
    return resolve({"resume": True, "output_dir": str(output)} | more, saved)


def connector_of(folder):
    return [p.detach() for p in load(folder).family.connector.parameters()]
