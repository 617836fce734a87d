"""Loader processes get families and images by pickling, unless they are forked."""

import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import test_family_generic as generic
import torch
from commands import train
from feature_checks import MODELS
from PIL import Image
from tiny import random_image, tiny_prompts

from vlm.data import Sample
from vlm.families import load_family

# Beside the models of the feature cache: one with a processor of images and videos, and one without a chat template.
FAMILIES = MODELS | {
    "llava_onevision": (lambda folder: generic.TestLlavaOnevision().build(folder), {}),
    "paligemma": (lambda folder: generic.TestPaliGemma().build(folder), {}),
    "gemma3": (lambda folder: generic.TestGemma3().build(folder), {}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_without_weights_is_pickled(name, tmp_path):
    build, options = FAMILIES[name]
    build(tmp_path)
    family = load_family(tmp_path, torch.float32, torch.device("cpu"), options)
    rendered = family.render(tiny_prompts())
    light = family.without_weights()
    again = pickle.loads(pickle.dumps(light))
    assert again.model is None and family.model is not None
    images = [random_image(0, 40, 28), random_image(1, 20, 60)]
    expected, found = family.encode_images(images), again.encode_images(images)
    assert found.token_ids == expected.token_ids
    assert found.inputs.keys() == expected.inputs.keys()
    for key, tensor in expected.inputs.items():
        assert torch.equal(found.inputs[key], tensor)
    assert again.response_ids(rendered.prompts, "a cat") == family.response_ids(rendered.prompts, "a cat")


@pytest.mark.slow
def test_a_training_runs_with_loader_processes_that_are_not_forked(color_folder, tmp_path):
    """With a family whose processor's class is made at run time."""
    generic.TestInternVL().build(tmp_path / "model")
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        code = train(
            "--dataset",
            color_folder,
            "--model",
            tmp_path / "model",
            "--output-dir",
            tmp_path / "out",
            "--epochs",
            1,
            "--workers",
            2,
            "--no-feature-cache",
        )
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert code == 0 and (tmp_path / "out" / "best_model" / "model.safetensors").is_file()


def test_two_threads_open_two_images_at_once():
    """In Python 3.11 a cached_property would let one wait for the other, and both would be refused by the barrier."""
    together = Barrier(2, timeout=20)

    def opened():
        together.wait()
        return Image.new("RGB", (4, 4))

    with ThreadPoolExecutor(2) as pool:
        sizes = list(pool.map(lambda sample: sample.image.size, [Sample(opened, 0, "a"), Sample(opened, 0, "b")]))
    assert sizes == [(4, 4), (4, 4)]
