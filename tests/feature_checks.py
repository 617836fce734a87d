"""What the tests of the feature cache have in common: small models of every family, and images of which two are the
same."""

import hub_layout_phi3_vision
import hub_layout_qwen2_vl
import test_family_generic
import torch
from tiny import random_image, save_tiny_model, tiny_prompts

from vlm.classifier.classifier import VLMClassifier
from vlm.config import resolve
from vlm.data import Rows, Split
from vlm.families import load_family
from vlm.training.tuning import prepare_tuning

LABELS = [0, 1, 2, 3]
# How each is built, and with which settings about images: what makes an image several rows of pixels, in unequal
# numbers.
MODELS = {
    "idefics3": (save_tiny_model, {}),
    "idefics3_tiles": (save_tiny_model, {"image_splitting": True}),
    "qwen2_vl": (hub_layout_qwen2_vl.save_published, {}),
    "qwen2_5_vl": (lambda folder: hub_layout_qwen2_vl.save_published(folder, "qwen2_5_vl"), {}),
    "phi3_v": (hub_layout_phi3_vision.save_published, {"num_crops": 4}),
    "llava": (lambda folder: test_family_generic.TestLlavaClip().build(folder), {}),
    "internvl": (lambda folder: test_family_generic.TestInternVL().build(folder), {}),
}


def split(count=4):
    """Images of unequal sizes and shapes; the last one is the first once more."""
    images = [random_image(i, 30 + 100 * i, 40 + 25 * i) for i in range(count - 1)]
    return Split(Rows([*images, images[0]], LABELS, [str(i) for i in range(count)]), range(count), LABELS)


def load(folder, options=MODELS["idefics3"][1], dtype=torch.float32, **settings):
    """A classifier from a folder, prepared for training (by default of the connector)."""
    family = load_family(folder, dtype, torch.device("cpu"), options)
    prepare_tuning(family, resolve({"tune": "connector"} | settings))
    return VLMClassifier(family, tiny_prompts())


def classifier_of(name, folder, **settings):
    """A new classifier of one of `MODELS`."""
    build, options = MODELS[name]
    build(folder)
    return load(folder, options, **settings)
