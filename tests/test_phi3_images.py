"""Phi-3.5-vision's images: tiles, padding, pixels and number of tokens, against plain numpy."""

import math

import numpy as np
import pytest
import torch
from hub_layout_phi3_vision import save_published
from PIL import Image
from tiny import random_image

from vlm.families import load_family
from vlm.families.phi3.images import CLIP_MEAN, CLIP_STD, Phi3VisionImages, fit_to_tiles


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_published(tmp_path_factory.mktemp("published"))


def load(folder, images):
    return load_family(folder, torch.float32, torch.device("cpu"), images)


@pytest.mark.slow
@pytest.mark.parametrize("num_crops", [1, 4, 16])
def test_number_of_tokens_over_many_shapes(folder, num_crops):
    family = load(folder, {"num_crops": num_crops})
    shapes = [*np.random.default_rng(0).integers(1, 300, (12, 2)).tolist(), (1, 1000), (1000, 1), (1, 1)]
    for width, height in shapes:
        encoded = family.encode_images([Image.new("RGB", (width, height))])
        (pixel_height, pixel_width), tokens = encoded.inputs["image_sizes"][0].tolist(), encoded.token_ids[0]
        rows, columns = pixel_height // 336, pixel_width // 336
        assert rows * columns <= num_crops and len(encoded.inputs["pixel_values"]) == 1 + rows * columns
        assert len(tokens) == (rows * columns + 1) * 144 + 1 + (rows + 1) * 12
        assert set(tokens) == {family.image_token_id}


@pytest.mark.parametrize(
    "num_crops, width, height, expected",
    [
        (1, 40, 30, 313),
        (1, 30, 400, 313),
        (4, 30, 30, 757),
        (4, 200, 30, 745),
        (4, 30, 200, 781),
        (16, 40, 30, 1921),
        (16, 30, 30, 2509),
    ],
)
def test_published_numbers_of_tokens(folder, num_crops, width, height, expected):
    encoded = load(folder, {"num_crops": num_crops}).encode_images([Image.new("RGB", (width, height))])
    assert len(encoded.token_ids[0]) == expected


def test_the_longer_side_gets_as_many_tiles_as_can_be_had():
    for size, num_crops, expected in [
        ((600, 300), 4, (672, 336)),
        ((300, 600), 4, (336, 672)),
        ((300, 300), 4, (672, 672)),
        ((300, 300), 16, (1344, 1344)),
        ((400, 300), 16, (1344, 1008)),
        ((3000, 10), 4, (1344, 336)),
        ((300, 300), 1, (336, 336)),
        ((3000, 10), 1, (336, 336)),
        ((10, 3000), 1, (336, 336)),
    ]:
        assert fit_to_tiles(Image.new("RGB", size), num_crops).size == expected, size


def test_image_is_resized_and_filled_up_with_white():
    image = random_image(0, 90, 40)
    fitted = np.array(fit_to_tiles(image, 1))
    height = int(336 / (90 / 40))  # 149
    top = (336 - height) // 2
    assert (fitted[:top] == 255).all() and (fitted[top + height :] == 255).all()
    assert (fitted[top : top + height] == np.array(image.resize((336, height), Image.Resampling.BILINEAR))).all()
    assert (fitted[top : top + height] != 255).any()


def test_portrait_is_the_transposed_landscape():
    image = random_image(1, 90, 40)
    portrait = Image.fromarray(np.array(image).transpose(1, 0, 2))
    for num_crops in (1, 4, 16):
        expected = np.array(fit_to_tiles(image, num_crops)).transpose(1, 0, 2)
        assert (np.array(fit_to_tiles(portrait, num_crops)) == expected).all()


def test_tiles_are_cut_line_by_line_after_the_global_view():
    image = random_image(2, 50, 40)
    batch = Phi3VisionImages(4)([image])
    fitted = np.array(fit_to_tiles(image, 4)) / 255
    normal = ((fitted - CLIP_MEAN) / CLIP_STD).transpose(2, 0, 1)
    assert batch["image_sizes"].tolist() == [[672, 672]] and len(batch["pixel_values"]) == 5
    for i, (y, x) in enumerate([(0, 0), (0, 336), (336, 0), (336, 336)]):
        np.testing.assert_allclose(batch["pixel_values"][1 + i], normal[:, y : y + 336, x : x + 336], atol=1e-5)
    for y, x in [(0, 0), (7, 300), (335, 335), (200, 11)]:
        np.testing.assert_allclose(
            batch["pixel_values"][0, :, y, x], bicubic(normal, y * 2 + 0.5, x * 2 + 0.5), atol=1e-5
        )


def bicubic(image: np.ndarray, y: float, x: float) -> np.ndarray:
    """The value between pixels by cubic convolution with a = -0.75 (Keys 1981), the border repeated."""

    def weight(t: float, a: float = -0.75) -> float:
        t = abs(t)
        return (a + 2) * t**3 - (a + 3) * t**2 + 1 if t <= 1 else a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a

    total = np.zeros(3)
    for row in range(math.floor(y) - 1, math.floor(y) + 3):
        for column in range(math.floor(x) - 1, math.floor(x) + 3):
            pixel = image[:, np.clip(row, 0, image.shape[1] - 1), np.clip(column, 0, image.shape[2] - 1)]
            total += weight(y - row) * weight(x - column) * pixel
    return total


def test_one_tile_is_its_own_global_view():
    batch = Phi3VisionImages(1)([random_image(3)])
    assert (batch["pixel_values"][0] == batch["pixel_values"][1]).all()


@pytest.mark.parametrize("num_crops", [1, 4, 16])
def test_no_image_takes_more_than_is_reckoned_with(folder, num_crops):
    family = load(folder, {"num_crops": num_crops})
    patches, tokens = family.image_load(num_crops=num_crops)
    encoded = [family.encode_images([Image.new("RGB", size)]) for size in ((10, 1000), (1000, 10), (30, 30), (40, 30))]
    assert max(len(image.token_ids[0]) for image in encoded) == tokens
    tiles = max(len(image.inputs["pixel_values"]) for image in encoded)
    with torch.no_grad():
        assert tiles * family.vision_features({"pixel_values": torch.zeros(1, 3, 336, 336)}).shape[1] == patches
