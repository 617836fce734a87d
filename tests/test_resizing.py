"""The fast way from images to pixels gives what transformers' processors give, and stands back where it does not."""

import json
import pickle

import numpy as np
import pytest
import torch
from hub_layout_qwen2_vl import save_published as save_qwen
from PIL import Image
from test_image_options import CPU
from tiny import save_tiny_model
from transformers import AutoImageProcessor

from vlm.families import idefics3, load_family, qwen2_vl
from vlm.families.images.resizing import TOLERANCE

SHAPES = [(1, 1), (3, 500), (28, 28), (64, 48), (47, 63), (300, 301), (700, 90), (1200, 1600)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    smolvlm, qwen = tmp_path_factory.mktemp("smolvlm"), tmp_path_factory.mktemp("qwen")
    return {"smolvlm": save_tiny_model(smolvlm, image_size=64), "qwen": save_qwen(qwen)}


def by_transformers(folder, family, images):
    image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    image_processor.size, nested = family.processor.image_processor.size, [[p] for p in images]
    return image_processor(nested if family.title == "SmolVLM" else images, return_tensors="pt")


def noise(width, height):
    return Image.fromarray(np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("model", ["smolvlm", "qwen"])
def test_every_shape_gives_the_pixels_of_transformers(model, folders):
    family = load_family(folders[model], torch.float32, CPU, {})
    assert family.resizes_fast
    images = [noise(*shape) for shape in SHAPES if model == "smolvlm" or max(shape) <= 100 * min(shape)]
    for batch in ([image] for image in images), [images]:
        for some in batch:
            ours, theirs = family.encode_images(some).inputs, by_transformers(folders[model], family, some)
            for name, tensor in ours.items():
                expected = theirs[name].flatten(0, 1) if model == "smolvlm" else theirs[name]
                assert tensor.dtype == expected.dtype
                torch.testing.assert_close(tensor, expected, rtol=0, atol=TOLERANCE)


def with_settings(folder, new, **settings):
    """A copy of a model folder whose image processor has other settings."""
    for path in folder.iterdir():
        (new / path.name).write_bytes(path.read_bytes())
        if path.suffix == ".json":
            config = json.loads(path.read_text(encoding="utf-8"))
            if "image_mean" in config:
                config |= settings
            if "image_processor" in config:
                config["image_processor"] |= settings
            (new / path.name).write_text(json.dumps(config), encoding="utf-8")
    return new


@pytest.mark.parametrize("model", ["smolvlm", "qwen"])
@pytest.mark.parametrize(
    ("settings", "fast"), [({"do_normalize": False}, False), ({"image_mean": [0.1, 0.2, 0.3], "resample": 2}, True)]
)
def test_settings_are_followed_or_left_to_the_processor(model, settings, fast, folders, tmp_path):
    folder = with_settings(folders[model], tmp_path, **settings)
    family = load_family(folder, torch.float32, CPU, {})
    assert family.resizes_fast is fast
    ours, theirs = family.encode_images([noise(90, 70)]).inputs, by_transformers(folder, family, [noise(90, 70)])
    torch.testing.assert_close(ours["pixel_values"].flatten(), theirs["pixel_values"].flatten(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("module", "name", "model"), [(idefics3, "one_tile", "smolvlm"), (qwen2_vl, "native_patches", "qwen")]
)
@pytest.mark.parametrize("error", [2e-5, None])
def test_where_it_differs_or_fails_the_processor_is_used(module, name, model, error, folders, monkeypatch):
    right = getattr(module, name)

    def wrong(image_processor, images):
        encoded = right(image_processor, images)
        encoded["pixel_values"].view(-1)[-1] += error  # raises TypeError without a number
        return encoded

    monkeypatch.setattr(module, name, wrong)
    family = load_family(folders[model], torch.float32, CPU, {})
    assert not family.resizes_fast
    ours, theirs = (
        family.encode_images([noise(90, 70)]).inputs,
        by_transformers(folders[model], family, [noise(90, 70)]),
    )
    assert torch.equal(ours["pixel_values"].flatten(), theirs["pixel_values"].flatten())


def test_loader_processes_get_the_answer_with_the_family(folders):
    family = load_family(folders["smolvlm"], torch.float32, CPU, {})
    light = pickle.loads(pickle.dumps(family.without_weights()))
    assert light.resizes_fast
    assert torch.equal(
        light.encode_images([noise(9, 7)]).inputs["pixel_values"],
        family.encode_images([noise(9, 7)]).inputs["pixel_values"],
    )


def test_split_images_are_left_to_the_processor(folders):
    family = load_family(folders["smolvlm"], torch.float32, CPU, {"image_splitting": True})
    assert not family.resizes_fast
    assert len(family.encode_images([noise(90, 70)]).inputs["pixel_values"]) > 1
